"""Each block of README and the docs is run: here, in another test, or not, for a reason that is listed here.

A block is known by its page and by a text inside it. What a block expects in its folder is made before it. The
names in a synopsis, such as FEATS, become files, and the brackets around its options fall away.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.command_server import CommandServer
from tests.conftest import ROOT
from tests.documented import Block, find_blocks
from tests.hub_server import FakeHub
from tests.shell import run_script

Key = tuple[str, str]

# A server answers before the next line.
FUNCTIONS = """\
robustfeat() {
  case $1 in
  serve)
    if [ -n "$SERVER" ]; then kill $SERVER; wait $SERVER || true; fi
    env robustfeat "$@" --port $PORT & SERVER=$!
    until curl -sf -o answer localhost:$PORT/health/ready; do kill -0 $SERVER; sleep 0.1; done ;;
  train) env robustfeat "$@" $QUICK ;;
  *) env robustfeat "$@" ;;
  esac
}
unzip() { python -m zipfile -e "$1" .; }
pip() { true; }
hf() { true; }
"""
PHOTOS = "ln -s examples/images photos\n"
FEATS = "robustfeat embed examples/images --out feats.npy --quiet\n"
CLOTHES = "cp -r $CLOTHES clothes\n"
MODEL = "cp -r $MODEL model\n"
PUSHED_MODEL = "cp -r $MODEL sent; robustfeat push sent org/name --tag v1\n"
PUSHED_HEAD = "robustfeat push $CLOTHES org/clothes --tag v1 --license cc0-1.0\n"
TEACHER = "cp -r $MODEL teacher\n"
CONVNEXT = (
    'python -c "import timm; from safetensors.torch import save_file;'
    " save_file(timm.create_model('test_convnext').state_dict(), 'w.safetensors')\"\n"
    "robustfeat import timm:test_convnext --weights w.safetensors --image-size 32 --no-int8 --out convnext\n"
)
# The last of an option's values counts, so each training is a short one.
QUICK = "QUICK='--epochs 1 --batch-size 8 --image-size 32 --lr 0.0001 --precision fp32 --workers 0 --quiet'\n"
RUN = "mkdir -p runs && cp -r $RUN runs/a\n"
FIXTURES = {"CLOTHES": "clothes", "MODEL": "model", "RUN": "finished_run"}


@dataclass(frozen=True)
class Case:
    """How a block is run.

    Attributes:
        setup: lines of a shell before it.
        names: what takes the place of its names.
        slow: whether it needs more than some seconds.
    """

    setup: str = ""
    names: dict[str, str] = field(default_factory=dict)
    slow: bool = False


HAT = "examples/images/hat/hat-1.jpg"
CASES: dict[Key, Case] = {
    ("embedding", "INPUT... --out"): Case("", {"INPUT...": "examples/images", "MODEL": "builtin"}),
    ("embedding", "--out feats/"): Case(),
    ("embedding", "--sync"): Case(PHOTOS + "robustfeat embed photos/hat --out feats.npy\n"),
    ("embedding", "--part 1/2"): Case(),
    ("embedding", "#SBATCH"): Case("echo examples/images/hat > list.txt; SLURM_ARRAY_TASK_ID=1\n"),
    ("collections", "similar FEATS QUERY... [-k"): Case(FEATS, {"FEATS": "feats.npy", "QUERY...": HAT}),
    ("collections", "--approximate"): Case(FEATS, {"FEATS": "feats.npy", "QUERY...": HAT}),
    ("collections", "duplicates FEATS"): Case(PHOTOS + FEATS, {"FEATS": "feats.npy", "COSINE": "0.9"}),
    ("collections", "map photos/"): Case(PHOTOS + FEATS, {"FEATS": "feats.npy"}),
    ("collections", "--collection photos=feats.npy"): Case(FEATS),
    ("drift", "drift REFERENCE NEW"): Case(
        FEATS + CLOTHES, {"REFERENCE": "feats.npy", "NEW": "examples/images/hat", "HEAD": "clothes"}
    ),
    ("drift", "--reference feats.npy"): Case(FEATS),
    ("evaluation", "evaluate builtin"): Case(slow=True),
    ("heads", "--labels labels.txt"): Case(
        "python -c \"import numpy as np; np.save('other.npy', np.random.default_rng(0).normal(size=(12, 4)))\"\n"
        "printf 'a\\nb\\n%.0s' 1 2 3 4 5 6 > labels.txt\n"
    ),
    ("heads", "--suggest 20"): Case(
        PHOTOS + "(echo path,label; for class in hat shoes; do for number in 1 2 3; do"
        " echo $class/$class-$number.jpg,$class; done; done) > labels.csv\n"
    ),
    ("heads", "--out clothes-head"): Case(),
    ("hub", "--revision v1\n"): Case(PHOTOS + PUSHED_MODEL),
    ("hub", "push model/"): Case(MODEL + "mkdir -p .venv/bin; touch .venv/bin/activate\n"),
    ("hub", "--results results.json"): Case(RUN + 'echo \'{"Accuracy": "none"}\' > results.json\n'),
    ("hub", "push clothes/"): Case(CLOTHES + PHOTOS),
    ("hub", 'FeatureExtractor.from_pretrained("org/name"'): Case(PUSHED_MODEL),
    ("hub", "Head.from_pretrained"): Case(PUSHED_HEAD),
    ("hub", "import net.onnx"): Case(
        "python - <<'END'\n"
        "import torch\n"
        "net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 16, 16), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())\n"
        "torch.onnx.export(net.eval(), torch.zeros(2, 3, 224, 224), 'net.onnx', dynamo=False,\n"
        "    input_names=['x'], output_names=['y'], dynamic_axes={'x': {0: 'n'}, 'y': {0: 'n'}})\n"
        "END\n"
    ),
    ("page", "robustfeat serve\n"): Case(),
    ("page", "unzip head.zip"): Case("cp -r $CLOTHES head; python -m zipfile -c head.zip head; rm -r head\n"),
    ("python", "serve --head clothes"): Case(CLOTHES),
    ("robustness", "--attack-rows 4"): Case(slow=True),
    ("serving", "svm fit"): Case("mkdir -p .venv/bin; touch .venv/bin/activate\n"),
    ("serving", "--manifest served.toml"): Case(
        CLOTHES
        + "printf '[heads]\\nclothes = \"clothes\"\\n' > served.toml; echo 'web 5tUgR0secretsecret' > keys.txt\n"
    ),
    ("training", "runs/clothes"): Case(QUICK, slow=True),
    ("training", "--set best=probe"): Case(PHOTOS + TEACHER + "ln -s examples/images pets\n" + QUICK, slow=True),
    ("training-methods", "runs/unlabelled"): Case(PHOTOS + TEACHER + QUICK, slow=True),
    ("training-methods", "runs/hardened"): Case(PHOTOS + TEACHER + CONVNEXT + QUICK, slow=True),
    ("triton", "--out repository"): Case(),
}

# Blocks that another test runs, by the comment above them, by their language or by a text inside.
ELSEWHERE: dict[Key, str] = {
    ("README", "<embed>"): "test_readme.py",
    ("README", "<answers>"): "test_readme.py",
    ("README", "<python>"): "test_readme.py",
    ("embedding", "<python>"): "test_readme.py",
    ("heads", "<python>"): "test_readme.py",
    ("python", "<python>"): "test_readme.py",
    ("interop", "<python>"): "test_interop.py",
    ("collections", "<qdrant>"): "test_exports.py",
    ("collections", "<fiftyone>"): "test_exports.py",
    ("drift", "$ robustfeat drift"): "cli/test_drift.py",
    ("evaluation", "<compare>"): "training/comparison/test_compare.py",
    ("page", "<tested>"): "serving/http/test_docs.py",
    ("serving", "<tested>"): "serving/http/test_docs.py",
    ("torchserve", "<tested>"): "serving/torchserve/test_docs.py",
    ("training-methods", "<own method>"): "training/test_own_method.py",
    ("triton", "<tested>"): "serving/test_triton.py",
    ("deploy", "--keys /served/keys.txt"): "deployment/test_images.py",
    ("deploy", "docker build"): "deployment/test_images.py",
}
NETWORK = "needs a network"
DOCKER = "needs Docker"
CLUSTER = "needs a Kubernetes cluster"
HOURS = "takes hours"
SYNOPSIS = "is a synopsis, whose forms other blocks show"
# Blocks that no test runs. Their commands and options are checked all the same.
LEFT_OUT: dict[Key, str] = {
    ("built-in", "pip download"): NETWORK,
    ("built-in", "git archive"): "needs the repository's history, which a clone may lack",
    ("built-in", "runs/tiny"): HOURS,
    ("README", "<hub>"): NETWORK,
    ("README", "<tests>"): "runs these tests",
    ("embedding", "s3://"): "needs a bucket",
    ("embedding", "timm:resnet50"): NETWORK,
    ("embedding", "$ robustfeat import"): NETWORK,
    ("embedding", "$ robustfeat doctor"): "reports this machine; tests/test_doctor.py finds the problems",
    ("collections", "clip.npy"): NETWORK,
    ("deploy", "robustfeat-train train"): DOCKER,
    ("deploy", "docker compose"): DOCKER,
    ("deploy", "pull ORG/NAME"): NETWORK,
    ("deploy", "apply -k deploy/base"): CLUSTER,
    ("deploy", "secret generic"): CLUSTER,
    ("deploy", "configmap robustfeat-manifest"): CLUSTER,
    ("deploy", "kserve"): CLUSTER,
    ("evaluation", "evaluate MODEL..."): SYNOPSIS,
    ("evaluation", "evaluate runs/*"): "needs runs with several seeds; tests/training/comparison makes them",
    ("evaluation", "paper table1"): HOURS,
    ("evaluation", "paper all"): HOURS,
    ("heads", "svm predict HEAD INPUT"): SYNOPSIS,
    ("hub", "dinov2-small      "): NETWORK,
    ("hub", "timm:vit_small"): NETWORK,
    ("hub", "hf:facebook"): NETWORK,
    ("hub", "embed_texts"): NETWORK,
    ("models", "feats.npy --model onnx-community/"): NETWORK,
    ("models", "$ robustfeat models"): "is shortened; tests/hub/test_catalog.py has the list",
    ("models", "pip download"): NETWORK,
    ("paper", "paper gate"): HOURS,
    ("paper", "--method el"): HOURS,
    ("results", "evaluate former"): HOURS,
    ("results", "paper all"): HOURS,
    ("robustness", "evaluate MODEL..."): SYNOPSIS,
    ("scaling", "scaling.py --images"): "tests/test_capacity.py calls the functions",
    ("scaling", "capacity.py measure"): "takes minutes; tests/test_capacity.py calls the functions",
    ("torchserve", "pip install"): "needs Java; the tests of TorchServe start it in this way",
    ("training", "--config imagenet-paper"): HOURS,
    ("training", "wandb"): NETWORK,
    ("training", "mlflow"): "needs MLflow",
    ("training", "timm:convnext_atto"): NETWORK,
    ("training-methods", "pip download"): NETWORK,
    ("training-methods", "steady:Steady"): "tests/training/test_own_method.py trains with the method",
    (
        "robustness",
        "--card robustness.json",
    ): "takes minutes; tests/training/evaluation/test_robustness_card.py has the card",
    ("training", "--out RUN ..."): SYNOPSIS,
    ("training", "export RUN"): SYNOPSIS,
    ("triton", "tritonserver"): DOCKER,
}
WHOLE = {"tutorial"}  # and all of how-to/: tests/test_how_to.py


def fits(key: Key, block: Block) -> bool:
    """Whether a key means a block."""
    page, text = key
    return page == block.page and (text in {f"<{block.marker}>", f"<{block.language}>"} or text in block.text)


def find(key: Key) -> Block:
    (block,) = (block for block in BLOCKS if fits(key, block))
    return block


BLOCKS = [block for block in find_blocks() if block.page not in WHOLE and not block.page.startswith("how-to/")]


def test_each_block_is_run_or_left_out_for_a_reason() -> None:
    keys = [*CASES, *ELSEWHERE, *LEFT_OUT]
    found = {block: [key for key in keys if fits(key, block)] for block in BLOCKS}
    assert not {(block.page, block.text): keys for block, keys in found.items() if len(keys) != 1}
    assert {key for keys in found.values() for key in keys} == set(keys)
    assert len([key for key in [*CASES, *LEFT_OUT] if find(key)]) == len(CASES) + len(LEFT_OUT)
    for (page, _), test in ELSEWHERE.items():
        assert f"{page}.md" in (ROOT / "tests" / test).read_text("utf-8"), test


def script_of(block: Block, case: Case) -> str:
    """The block's lines for a shell."""
    if block.language == "python":  # a line of a longer program
        return f"python - <<'END'\nfrom robustfeat import *\n{block.text}END\n"
    script = re.sub(r"^\$ ", "", block.text, flags=re.MULTILINE)
    if case.names:
        script = re.sub(r"\n +(?=\[?--)", " ", script)
        for name, value in {"[": "", "]": "", **case.names}.items():
            script = script.replace(name, value)
    return script


@pytest.mark.parametrize(
    "key",
    [
        pytest.param(key, marks=[pytest.mark.slow] if case.slow else [], id=f"{key[0]}: {key[1].strip()}")
        for key, case in CASES.items()
    ],
)
def test_the_commands_of_a_block_succeed(
    key: Key,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    commands: CommandServer,
    hub: FakeHub,
    request: pytest.FixtureRequest,
) -> None:
    commands.run(["--version"])  # starts it
    case = CASES[key]
    script = case.setup + script_of(find(key), case)
    variables = {
        name: str(request.getfixturevalue(fixture)) for name, fixture in FIXTURES.items() if f"${name}" in script
    }
    with run_script(FUNCTIONS + script, tmp_path, tmp_path_factory, hub, SERVER="", QUICK="", **variables) as log:
        assert "Traceback" not in log.read_text("utf-8")
