"""Make the packaged photographs in src/repa/data/photographs/: 19 from a Debian package, one from a wheel.

    apt-get download plasma-workspace-data && dpkg-deb -x plasma-workspace-data_*.deb unpacked
    pip download --no-deps scikit-image==0.26.0 && python -m zipfile -e scikit_image-*.whl unpacked
    python tools/make_photographs.py --avatars unpacked/usr/share/plasma/avatars/photos \
        --coffee unpacked/skimage/data/coffee.png

KDE's plasma-workspace contains the avatars, each with a file that names author, origin and licence. The documentation
of scikit-image's `skimage.data.coffee` names those of its picture. All are CC0.
"""

import argparse
import re
from pathlib import Path

from PIL import Image, ImageOps

SIDE = 256
QUALITY = 90
FOLDER = Path(__file__).parents[1] / "src/repa/data/photographs"
AVATARS = {  # class name -> KDE's file
    "astronaut": "Astronaut",
    "books": "Books",
    "car": "Car",
    "cat": "Cat",
    "chameleon": "Chameleon",
    "cocktail": "Cocktail",
    "dog": "Dog",
    "football": "Soccer",
    "goldfish": "Fish",
    "hot-air-balloon": "Air Balloon",
    "light-bulb": "Bulb",
    "owl": "Owl",
    "paintbrushes": "Brushes",
    "pancakes": "Pancakes",
    "parrot": "Parrot",
    "pencils": "Pencils",
    "space-shuttle": "Shuttle",
    "sunflower": "Sunflower",
    "sushi": "Sushi",
}
COFFEE = (
    "Rachel Michetti, courtesy of Pikolo Espresso Bar",
    "https://scikit-image.org/docs/stable/api/skimage.data.html#skimage.data.coffee",
)
HEAD = f"""# Where the photographs come from

Every photograph is dedicated to the public domain by its author under
[CC0 1.0](https://creativecommons.org/publicdomain/zero/1.0/). `tools/make_photographs.py` cropped them to squares of
{SIDE} pixels and wrote this table. KDE's plasma-workspace (`kcms/users/avatars/photos`) and the documentation of
scikit-image state author, licence and origin of each.

| file | author | origin | through |
|---|---|---|---|
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--avatars", type=Path, required=True, help="KDE's folder avatars/photos, with .license files")
    parser.add_argument("--coffee", type=Path, required=True, help="scikit-image's coffee.png")
    given = parser.parse_args()
    rows = {}
    for name, file in AVATARS.items():
        author, origin = provenance((given.avatars / f"{file}.png.license").read_text())
        save(given.avatars / f"{file}.png", name)
        rows[name] = (author, origin, "KDE plasma-workspace")
    save(given.coffee, "coffee")
    rows["coffee"] = (*COFFEE, "scikit-image")
    table = "".join(f"| `{name}.jpg` | {' | '.join(rows[name])} |\n" for name in sorted(rows))
    (FOLDER / "ATTRIBUTION.md").write_text(HEAD + table)


def provenance(text: str) -> tuple[str, str]:
    """Author and address from a .license file; raises unless the licence is CC0."""
    if "SPDX-License-Identifier: CC0-1.0" not in text:
        raise SystemExit(f"This is not CC0:\n{text}")
    author, address = re.search(r"SPDX-FileCopyrightText: \d+ ([^<\n]+)", text), re.search(r"https://\S+", text)
    if author is None or address is None:
        raise SystemExit(f"This names no author, or no address:\n{text}")
    return author[1].strip(), address[0]


def save(source: Path, name: str) -> None:
    """Save the middle square of a picture at SIDE pixels, as JPEG without metadata."""
    with Image.open(source) as image:
        square = ImageOps.fit(image.convert("RGB"), (SIDE, SIDE), Image.Resampling.LANCZOS)
    square.save(FOLDER / f"{name}.jpg", quality=QUALITY, optimize=True)


if __name__ == "__main__":
    main()
