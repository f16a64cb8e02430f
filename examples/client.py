"""Asks a running `robustfeat serve` about a folder of images, several requests at a time.

    robustfeat serve --head clothes &
    python examples/client.py http://127.0.0.1:8000/predict/clothes examples/images/hat

A busy server answers 429 or 503. The client then waits as long as the server says.
"""

import json
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def ask(url: str, file: Path) -> str:
    """The prediction for an image, or why there is none."""
    while True:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, file.read_bytes())) as answer:
                return str(json.load(answer)["data"][0]["prediction"])
        except urllib.error.HTTPError as error:
            if error.code not in {429, 503}:
                return f"{error.code}: {json.load(error)['error']['message']}"
            time.sleep(float(error.headers.get("Retry-After", 1)))


def main(url: str, folder: str) -> None:
    """Prints each image with its prediction, in the order of the names."""
    files = sorted(file for file in Path(folder).rglob("*") if file.is_file())
    with ThreadPoolExecutor(8) as pool:
        for file, prediction in zip(files, pool.map(lambda file: ask(url, file), files), strict=True):
            print(f"{file.name}: {prediction}")


if __name__ == "__main__":
    main(*sys.argv[1:])
