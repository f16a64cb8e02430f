"""Models, heads and collections of a server by name, from the command line or a file of TOML.

[models]                        # the first is the default; without this table it is the built-in model
robustfeat = "builtin"

[heads]                         # at /predict/NAME
clothes = "org/clothes@v3#9f86d081..."

[collections]                   # at /similar/NAME
photos = "/data/photos.npy"
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from robustfeat.errors import InputError
from robustfeat.hub.place import Place
from robustfeat.serving.http.watched import read_text

__all__ = ["Manifest", "read_manifest"]

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_DEFAULT = {"robustfeat": Place("builtin")}


@dataclass(frozen=True)
class Manifest:
    """Models, heads and collections by name.

    Attributes:
        models: the first is the default.
        heads: at /predict/NAME.
        collections: files of features, at /similar/NAME. Their `sha256` is the hash of the meta file.
    """

    models: Mapping[str, Place]
    heads: Mapping[str, Place]
    collections: Mapping[str, Place]

    @classmethod
    def of_options(cls, models: Iterable[str], heads: Iterable[str], collections: Iterable[str]) -> Manifest:
        """The manifest of options, each a [NAME=]PLACE.

        Raises:
            InputError: a name is odd, or is there twice.
        """
        # A file's name without its suffix is the name of its collection.
        files = [one if "=" in one else f"{Path(one).stem}={one}" for one in collections]
        return cls(
            _named("models", models, Place.parse) or _DEFAULT,
            _named("heads", heads, Place.parse),
            _named("collections", files, Place),
        )

    @classmethod
    def from_dict(cls, parts: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Manifest:
        """The inverse of `to_dict`."""
        return cls(**{part: {name: Place(**one) for name, one in named.items()} for part, named in parts.items()})

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return asdict(self)

    def pin_model(self, revision: str | None, config_hash: str | None) -> Manifest:
        """The same with the revision and the hash of the only model.

        Raises:
            InputError: there are several models, or that one has others.
        """
        given = {name: value for name, value in (("revision", revision), ("sha256", config_hash)) if value}
        if not given:
            return self
        argument = "revision" if revision else "config_hash"
        (name, place), *others = self.models.items()
        if others:
            raise InputError(
                f"is for one model; there are {len(self.models)}",
                argument=argument,
                fix="write PLACE@REVISION#SHA256 for each in `models`",
            )
        if any(getattr(place, key) for key in given):
            raise InputError(f"the model {name} has another one", argument=argument, fix=f"leave `{argument}` out")
        return replace(self, models={name: replace(place, **given)})


def read_manifest(path: Path) -> Manifest:
    """The manifest in a file of TOML.

    Raises:
        InputError: it cannot be read, or holds something else.
    """

    def refusal(what: str) -> InputError:
        return InputError(what, argument="manifest", value=path)

    try:
        content = tomllib.loads(read_text(path))
    except (OSError, UnicodeDecodeError) as exc:
        raise refusal(str(exc.strerror) if isinstance(exc, OSError) else "not UTF-8") from exc
    except (tomllib.TOMLDecodeError, RecursionError) as exc:
        raise refusal(f"not valid TOML ({exc})") from exc
    tables = [field.name for field in fields(Manifest)]
    for table, named in content.items():
        if table not in tables or not isinstance(named, dict):
            raise refusal(f"expected the tables {', '.join(tables)}; got {table}")
        for name, text in named.items():
            if not isinstance(text, str) or not _NAME.fullmatch(name):
                raise refusal(
                    f"[{table}] {name}: expected NAME = \"PLACE\", the name of letters, digits, '.', '_' and '-' "
                    "(in quotes if it has a dot)"
                )
    if not content:  # an editor or a tool may just have emptied the file
        raise InputError(
            "names no model, head or collection",
            argument="manifest",
            value=path,
            fix='write robustfeat = "builtin" under [models] for the built-in model only',
        )
    models, heads = ({name: Place.parse(text) for name, text in content.get(part, {}).items()} for part in tables[:2])
    collections = {name: Place(text) for name, text in content.get("collections", {}).items()}
    return Manifest(models or _DEFAULT, heads, collections)


def _named(argument: str, entries: Iterable[str], parse: Callable[[str], Place]) -> dict[str, Place]:
    """Places by name, of NAME=PLACE or of a place whose last part is the name."""
    found: dict[str, Place] = {}
    for entry in entries:
        name, equals, text = ("", "", entry) if Path(entry).is_dir() else entry.partition("=")
        place = parse(text if equals else entry)
        if not equals:
            name = "robustfeat" if place.name == "builtin" else Path(place.name).absolute().name
        if name in found or not _NAME.fullmatch(name):
            raise InputError(
                "expected NAME=PLACE, each name once, of letters, digits, '.', '_' and '-'",
                argument=argument,
                value=entry,
            )
        found[name] = place
    return found
