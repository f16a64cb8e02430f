"""Schemas of requests and replies, which check requests and document both."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field

__all__ = [
    "Embeddings",
    "ErrorAnswer",
    "Health",
    "InferError",
    "InferRequest",
    "InferResponse",
    "Info",
    "ModelList",
    "ModelMetadata",
    "ModelReady",
    "OpenAIEmbeddings",
    "OpenAIRequest",
    "Predictions",
    "ServerMetadata",
    "Similar",
    "TaughtHead",
    "TeachRequest",
]


class Error(BaseModel):
    """OpenAI's error object."""

    message: str = Field(description="One sentence: what was expected, what arrived, what to do.")
    type: str = Field(examples=["invalid_request_error"])
    param: str | None = Field(description="The wrong part of the request.")
    code: str = Field(description="For programs.", examples=["unreadable_image"])


class Item(BaseModel):
    """The result of one image."""

    index: int = Field(description="Position of the image in the request, from 0.")


class FailedItem(Item):
    """An unreadable image."""

    error: Error


class EmbeddedItem(Item):
    """An image's features."""

    embedding: list[float]


class PredictedItem(Item):
    """A head's prediction."""

    prediction: str | int | list[str | int] = Field(description="A list if an image may have several labels.")
    margins: dict[str, float]
    probabilities: dict[str, float] | None = None
    typicality: float | None = Field(
        None, description="The share of unseen images of the classes that are at least as unlike them; near 0: of none."
    )


class About(BaseModel):
    """The model of a reply."""

    model: str
    revision: str | None = Field(description="The commit on the Hub; null if unknown.")
    precision: Literal["fp32", "fp16", "bf16", "int8"]


class Embeddings(About):
    """The reply of /embed."""

    data: list[EmbeddedItem | FailedItem]


class Predictions(About):
    """The reply of /predict."""

    head: str
    data: list[PredictedItem | FailedItem]


class Match(BaseModel):
    """An image of a collection."""

    row: int = Field(description="Number of the row, from 0.")
    path: str = Field(description="Path in the index.")
    path_bytes: str | None = Field(None, description="The path as base64, if it is not UTF-8.")
    cosine: float


class SimilarItem(Item):
    """The most similar images to one image, the nearest first."""

    matches: list[Match]


class Similar(About):
    """The reply of /similar."""

    collection: str
    data: list[SimilarItem | FailedItem]


class ErrorAnswer(BaseModel):
    """Every error outside /v2."""

    error: Error
    data: list[FailedItem] | None = Field(None, description="The error of each image, if all images failed.")


class OpenAIRequest(BaseModel):
    """OpenAI's request for embeddings, with images in place of texts."""

    model_config = ConfigDict(strict=True)

    input: str | list[str] = Field(
        description="An image as a data URI, data:image/jpeg;base64,..., or a list of them. URLs are not fetched.",
        examples=["data:image/jpeg;base64,/9j/4AAQSkZJRg=="],
    )
    model: str | None = Field(None, description="A served model; by default the first.")
    encoding_format: Literal["float", "base64"] | None = Field(
        "float", description="base64 is of float32, little-endian."
    )
    dimensions: int | None = Field(None, description="If given, the model's number of features.")
    user: str | None = None


class OpenAIEmbedding(BaseModel):
    """One of OpenAI's embeddings."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Usage(BaseModel):
    """OpenAI's counts of tokens, always zero."""

    prompt_tokens: int
    total_tokens: int


class OpenAIEmbeddings(About):
    """OpenAI's reply."""

    object: Literal["list"]
    data: list[OpenAIEmbedding]
    usage: Usage


class OpenAIModel(BaseModel):
    """One of OpenAI's models."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(BaseModel):
    """OpenAI's list of models."""

    object: Literal["list"]
    data: list[OpenAIModel]


class Health(BaseModel):
    """Whether the server, or a part of it, works."""

    status: str


class ModelInfo(BaseModel):
    """A model that is served."""

    name: str
    model: str = Field(description="The name in its config.json.")
    revision: str | None
    precision: str
    engine: str
    device: str
    decoding: str
    feature_size: int
    image_size: int
    weights_sha256: str
    preprocessing_hash: str
    pooling: str | None = Field(description="Pooling of a transformers model: embeds, pooler, cls or mean.")
    config_hash: str
    batch_size: int = Field(description="Largest batch, in images.")


class HeadInfo(BaseModel):
    """A served head."""

    name: str
    model: str = Field(description="The served model of its features.")
    classes: list[str | int]
    kind: str
    multi_label: bool = Field(description="Whether an image may have several classes, or none.")
    revision: str | None = Field(description="The commit on the Hub; null for a folder.")
    sha256: str | None = Field(description="The sha256 of head.json, which pins the head.")
    probabilities: bool = Field(description="Whether replies have calibrated probabilities.")
    typicality: bool = Field(description="Whether replies have typicality, which detects images of no known class.")


class CollectionInfo(BaseModel):
    """A served collection."""

    name: str
    model: str = Field(description="The served model of its features.")
    rows: int


class Info(BaseModel):
    """The models, heads, collections and limits of a server."""

    version: str
    models: list[ModelInfo]
    heads: list[HeadInfo]
    collections: list[CollectionInfo]
    limits: dict[str, float]
    formats: list[str] = Field(description="Accepted image formats, recognised by content.")
    workers: int


class InferError(BaseModel):
    """Every error under /v2."""

    error: str


class ServerMetadata(BaseModel):
    """The Open Inference Protocol's description of a server."""

    name: str
    version: str
    extensions: list[str]


class Tensor(BaseModel):
    """A tensor's name, type and shape; -1 is any size."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(BaseModel):
    """The Open Inference Protocol's description of a model."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[Tensor]
    outputs: list[Tensor]


class ModelReady(BaseModel):
    """Whether a model is ready."""

    name: str
    ready: bool


class InferParameters(BaseModel):
    """Parameters of requests. Others are ignored."""

    model_config = ConfigDict(strict=True)

    binary_data_size: int | None = Field(None, description="Input: number of its bytes after the JSON part.")
    binary_data: bool | None = Field(None, description="Output: whether to send its bytes after the JSON part.")
    binary_data_output: bool | None = Field(None, description="Request: `binary_data` for all outputs.")


class InferInput(BaseModel):
    """`images`, BYTES: encoded images, base64 in JSON. Or `pixel_values`, FP32: the network's input."""

    model_config = ConfigDict(strict=True)

    name: Literal["images", "pixel_values"]
    datatype: Literal["BYTES", "FP32"]
    shape: Annotated[list[int], FailFast()] = Field(min_length=1, max_length=4, examples=[[1]])
    data: list[Any] | None = Field(None, description="Not with the binary extension.", examples=[["/9j/4AAQSkZJRg=="]])
    parameters: InferParameters | None = None


class InferRequestedOutput(BaseModel):
    """A requested output."""

    model_config = ConfigDict(strict=True)

    name: Literal["features"]
    parameters: InferParameters | None = None


class InferRequest(BaseModel):
    """The Open Inference Protocol's request."""

    model_config = ConfigDict(strict=True)

    # Stop at the first wrong entry, since a million wrong entries would give a million messages.
    inputs: Annotated[list[InferInput], FailFast()] = Field(min_length=1, max_length=1)
    outputs: Annotated[list[InferRequestedOutput] | None, FailFast()] = Field(None, max_length=1)
    id: str | None = None
    parameters: InferParameters | None = None


class InferOutput(Tensor):
    """`features`, FP32, (n, D), flattened."""

    data: list[float] | None = None
    parameters: dict[str, Any] | None = None


class InferResponse(BaseModel):
    """The Open Inference Protocol's reply."""

    model_name: str
    model_version: str
    outputs: list[InferOutput]
    id: str | None = None
    parameters: dict[str, Any] | None = None


class TeachRequest(BaseModel):
    """Labelled rows of features, to fit a head on."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = Field(None, description="The model of the features; by default the first served one.")
    classes: Annotated[list[str], Field(min_length=2, max_length=50)] = Field(
        description="Names, each of 1 to 200 characters."
    )
    labels: Annotated[list[int], FailFast()] = Field(
        min_length=2, max_length=1000, description="The class number of each row, from 0."
    )
    features: str = Field(description="Rows by features in float32, little-endian, as base64.")
    name: str = Field(
        "head",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,95}$",
        description="Name of the folder in the zip file, of letters, digits, '.', '_' and '-'.",
    )


class Calibration(BaseModel):
    """Scale and offset that turn margins into logits."""

    scale: list[float]
    offset: list[float]


class TaughtHead(About):
    """A linear head.

    A row of features is divided by its norm. Its margins are coefficients times the row plus intercepts, and of two
    classes the first one's is minus the second one's. Probabilities are the softmax of margins times scale plus
    offset, or of two classes the sigmoid.
    """

    classes: list[str] = Field(description="Classes with rows, sorted.")
    rows: int
    kind: Literal["svm"]
    scaling: Literal["l2"]
    coefficients: str = Field(description="Classes, or 1 of two, by features in float64, little-endian, as base64.")
    intercepts: str = Field(description="The same for each row of coefficients.")
    calibration: Calibration | None = Field(description="null if every class has a single row.")
    accuracy: float | None = Field(description="Accuracy on held-out rows, by five-fold cross-validation.")
    rows_scored: int
