"""Builds a Dockerfile's image without a container engine, and runs it: its instructions in folders, by chroot.

A base image is a folder with a small Debian and Python. Each stage is a copy of its base, in which the stage's
instructions take place. A container is such a folder, mounted read-only, with its own processes.

Known instructions: FROM, ARG, ENV, WORKDIR, COPY, RUN, USER, ENTRYPOINT, CMD, HEALTHCHECK and EXPOSE. Needs root.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import ssl
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

__all__ = ["Image", "build", "chroot", "debian_root", "instructions", "run_command"]

_MOUNT = re.compile(r"--mount=(\S+)\s+")


@dataclass(frozen=True)
class Image:
    """What a stage has become.

    Attributes:
        root: its folder.
        environment: of its commands.
        folder: where they start.
        user: UID:GID.
        entrypoint, command, health: in exec form.
    """

    root: Path
    environment: Mapping[str, str] = field(default_factory=lambda: {"PATH": "/usr/local/bin:/usr/bin:/bin"})
    folder: str = "/"
    user: str = "0:0"
    entrypoint: Sequence[str] = ()
    command: Sequence[str] = ()
    health: Sequence[str] = ()


def debian_root(place: Path) -> Path:
    """A folder with Debian 13, its Python 3.13 and nothing else, made once."""
    if not (place / "done").exists():
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        packages = "ca-certificates,python3,python3-venv"
        command = ["debootstrap", "--variant=minbase", f"--include={packages}", "trixie", str(place / "root")]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        shutil.rmtree(place / "root" / "var" / "cache" / "apt")
        (place / "done").touch()
    return place / "root"


def instructions(dockerfile: Path) -> Iterator[tuple[str, str]]:
    """Names and arguments, continued lines joined."""
    lines = [line for line in dockerfile.read_text("utf-8").splitlines() if not line.lstrip().startswith("#")]
    for line in re.sub(r"\\\n", " ", "\n".join(lines)).splitlines():
        if line.strip():
            name, _, rest = line.strip().partition(" ")
            yield name, rest.strip()


def build(
    dockerfile: Path,
    context: Path,
    base: Path,
    work: Path,
    *,
    arguments: Mapping[str, str],
    cache: Path,
    environment: Mapping[str, str],
) -> dict[str, Image]:
    """The images of all stages by their names.

    Args:
        dockerfile, context: what is built.
        base: stands for every base image that is not a stage.
        work: an empty folder for the stages' roots.
        arguments: for ARG.
        cache: stands for the cache mounts of RUN.
        environment: of RUN only, such as a proxy.
    """
    stages: dict[str, Image] = {}
    image, name = Image(base), ""
    given: dict[str, str] = {}
    for instruction, text in instructions(dockerfile):
        if instruction == "FROM":
            source, name = re.fullmatch(r"(\S+) AS (\S+)", text).groups()  # type: ignore[union-attr]
            image = replace(stages.get(source, Image(base)), root=work / name)
            subprocess.run(["cp", "-a", str(stages.get(source, Image(base)).root), str(image.root)], check=True)
            given = {}
        elif instruction == "ARG":
            key, _, default = text.partition("=")
            given[key] = arguments.get(key, default)
        elif instruction == "COPY":
            _copy(text, image, context, stages)
        elif instruction == "RUN":
            command = ["/bin/sh", "-c", _MOUNT.sub("", text)]
            caches = dict.fromkeys(re.findall(r"type=cache,target=([^,\s]+)", text), cache)
            _run_inside(image, command, {**given, **environment}, caches)
        elif instruction == "WORKDIR":
            (image.root / text.lstrip("/")).mkdir(parents=True, exist_ok=True)
            image = replace(image, folder=text)
        else:
            image = _described(image, instruction, text)
        stages[name] = image
    return stages


def _described(image: Image, instruction: str, text: str) -> Image:
    """The image after an instruction that only says how it runs."""
    if instruction == "ENV":
        pairs = dict(pair.split("=", 1) for pair in shlex.split(text))
        known = dict(image.environment)
        known |= {key: value.replace("$PATH", known["PATH"]) for key, value in pairs.items()}
        return replace(image, environment=known)
    if instruction == "USER":
        return replace(image, user=text)
    if instruction == "ENTRYPOINT":
        return replace(image, entrypoint=json.loads(text))
    if instruction == "CMD":
        return replace(image, command=json.loads(text))
    if instruction == "HEALTHCHECK":
        return replace(image, health=json.loads(text[text.index("[") :]))
    assert instruction == "EXPOSE", instruction
    return image


def _copy(text: str, image: Image, context: Path, stages: Mapping[str, Image]) -> None:
    words = shlex.split(text)
    origin = stages[words.pop(0).partition("=")[2]].root if words[0].startswith("--from=") else context
    *sources, target = words
    place = image.root / (Path(image.folder) / target).as_posix().lstrip("/")
    for source in sources:
        found = origin / source.lstrip("/")
        if found.is_dir():  # its content
            shutil.copytree(
                found, place, symlinks=True, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__")
            )
        else:
            into = place / found.name if target.endswith("/") else place
            into.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(found, into)


def _run_inside(
    image: Image, command: Sequence[str], environment: Mapping[str, str], mounts: Mapping[str, Path]
) -> None:
    """RUN: as root, with the network of this machine and the certificates that it trusts."""
    trusted = image.root / "tmp" / "certificates"
    shutil.copy(ssl.get_default_verify_paths().openssl_cafile, trusted)
    shutil.copy("/etc/resolv.conf", image.root / "etc" / "resolv.conf")
    steps = []
    for place, outside in mounts.items():
        inside = image.root / place.lstrip("/")
        inside.mkdir(parents=True, exist_ok=True)
        steps.append(f"mount --bind {shlex.quote(str(outside))} {shlex.quote(str(inside))}")
    settings = {"PIP_CERT": "/tmp/certificates", "SSL_CERT_FILE": "/tmp/certificates", **environment}
    done = subprocess.run(_isolated(image, command, settings, steps), capture_output=True, text=True, check=False)
    trusted.unlink()
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}{done.stderr}"


def run_command(
    image: Image,
    command: Sequence[str] = (),
    *,
    environment: Mapping[str, str] = {},
    writable: Sequence[str] = (),
) -> list[str]:
    """What to run on this machine to run the image: as its user, with a read-only root and a network of its own.

    Args:
        image: what `build` gave.
        command: instead of its CMD.
        environment: added to its own.
        writable: folders that are empty file systems in memory; all else cannot be written to.
    """
    root = shlex.quote(str(image.root))
    steps = ["ip link set lo up", f"mount --bind {root} {root}", f"mount -o remount,bind,ro {root}"]
    for place in writable:
        (image.root / place.lstrip("/")).mkdir(exist_ok=True)
        steps.append(f"mount -t tmpfs -o mode=1777 tmpfs {root}{place}")
    entered = [*image.entrypoint, *(command or image.command)]
    return _isolated(image, entered, environment, steps, ["--net"])


def _isolated(
    image: Image,
    command: Sequence[str],
    environment: Mapping[str, str],
    steps: Sequence[str],
    namespaces: Sequence[str] = (),
) -> list[str]:
    """The command in the image's root, where it is process 1, after steps outside of the root."""
    root = shlex.quote(str(image.root))
    mounts = [f"mount -t proc proc {root}/proc", f"mount --bind /dev {root}/dev"]
    enter = shlex.join(chroot(image, command, environment))
    script = " && ".join([*steps, *mounts, f"exec {enter}"])
    return ["unshare", "--mount", "--pid", "--fork", "--kill-child", *namespaces, "sh", "-c", script]


def chroot(image: Image, command: Sequence[str], environment: Mapping[str, str] = {}) -> list[str]:
    """The command in the image's root, as its user and with its environment only."""
    settings = [f"{key}={value}" for key, value in {**image.environment, **environment}.items()]
    enter = ["chroot", f"--userspec={image.user}", "--groups=", str(image.root)]
    return [*enter, "env", "-i", "-C", image.folder, *settings, *command]
