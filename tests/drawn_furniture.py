"""A stand-in for the furniture packages: boxes under many names."""

import zipfile
from pathlib import Path

NAMES = (
    *("Chair",) * 3,
    *("Table",) * 2,
    "Female",
    "Parking slot 60\\u00b0",
    "Ford Focus",
    "Chevrolet",
    "Hammer",
    "Lamp",
)
MORE = tuple(
    f"Thing {word}" for word in ("alpha", "beta", "gamma", "delta", "eta", "zeta", "theta", "iota", "kappa", "mu")
)

BOX = """
mtllib box.mtl
v -1 0 -1
v 1 0 -1
v 1 0 1
v -1 0 1
v -1 2 -1
v 1 2 -1
v 1 2 1
v -1 2 1
usemtl paint
f 4 3 7 8
f 1 5 6 2
f 1 4 8 5
f 2 6 7 3
f 5 8 7 6
f -8 -7 -6 -5
"""

PAINT = "newmtl paint\nKd 0.8 0.1 0.1\nKs 0.2 0.2 0.2\nNs 30\n"


def write_furniture(root: Path) -> Path:
    """The folder of the asset below `root`, with one package."""
    folder = root / "sweethome3d-furniture" / "usr/share/sweethome3d/furniture"
    folder.mkdir(parents=True)
    lines = []
    with zipfile.ZipFile(folder / "Made.sh3f", "w") as archive:
        for number, name in enumerate((*NAMES, *MORE), 1):
            model = f"made/m{number}/box.obj"
            archive.writestr(model, BOX)
            archive.writestr(f"made/m{number}/box.mtl", PAINT)
            lines += [
                f"id#{number}=Made#m{number}",
                f"name#{number}={name}",
                f"category#{number}={'Office' if number % 2 else 'Kitchen'}",
                f"model#{number}=/{model}",
            ]
        archive.writestr("PluginFurnitureCatalog.properties", "\n".join(lines))
    return root
