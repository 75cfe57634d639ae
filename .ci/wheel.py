"""Build the distributions, check what is in them, and use the wheel outside of the source tree.

    python .ci/wheel.py [--out FOLDER]

The wheel is installed into a clean virtual environment with the extra of this machine's backend; there, in another
directory, all entry points of both packages are loaded, `kvq` runs, and so does the demo. Needs `build` and `twine` (of
the extra `dev`). Takes about two minutes, most of them for installing dependencies.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("mlx_kvq_plugin", "model_adapters")

# Run in the clean environment: loads every entry point of the groups, and says where the packages lie.
CHECK = """
import json, sys
from importlib.metadata import entry_points
import mlx_kvq_plugin, model_adapters
found = {}
for group in json.loads(sys.argv[1]):
    own = [e for e in entry_points(group=group) if e.dist.name == "mlx-kvq-plugin"]
    for entry in own:
        entry.load()
    found[group] = {entry.name: entry.value for entry in own}
print(json.dumps({"found": found, "files": [mlx_kvq_plugin.__file__, model_adapters.__file__]}))
"""


def run(*command: str | Path, cwd: Path = ROOT, quiet: bool = False) -> str:
    """Run a command without this process's Python paths; its output if `quiet`. Ends the script if it fails."""
    words = [str(word) for word in command]
    print("$", " ".join(words), flush=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(words, cwd=cwd, env=environment, text=True, capture_output=quiet)
    if done.returncode != 0:
        sys.exit(f"{words[0]} must exit with 0, got {done.returncode}\n{done.stdout or ''}{done.stderr or ''}")
    return done.stdout or ""


def tracked(*folders: str) -> set[str]:
    """Files of the repository in these folders."""
    return set(run("git", "ls-files", "--", *folders, quiet=True).split("\n")) - {""}


def check_contents(wheel: Path, source: Path) -> None:
    """Every tracked file of the packages is in the wheel, every one of the repository in the source distribution."""
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    with tarfile.open(source) as archive:
        shipped = {name.partition("/")[2] for name in archive.getnames()}
    missing = sorted(tracked(*PACKAGES) - held)
    strangers = sorted({name.split("/")[0] for name in held} - {*PACKAGES, f"{wheel.stem.split('-py3')[0]}.dist-info"})
    unshipped = sorted(name for name in tracked() - shipped if not name.startswith(".") or name.startswith(".ci/"))
    for what, names in (("lacks", missing), ("has stray folders", strangers)):
        if names:
            sys.exit(f"the wheel {what}: {', '.join(names)}; see [tool.setuptools] in pyproject.toml")
    if unshipped:
        sys.exit(f"the source distribution lacks {', '.join(unshipped)}; see MANIFEST.in")
    print(f"{wheel.name}: {len(held)} files; {source.name}: {len(shipped)} files")


def backend_extra() -> str:
    """The extra that brings MLX's backend: none on macOS."""
    return "" if platform.system() == "Darwin" else "[cpu]"


def check_installed(python: Path, folder: Path, project: dict[str, object]) -> None:
    """Both packages are those of the environment, and offer the entry points that pyproject.toml lists."""
    groups = project["entry-points"]
    assert isinstance(groups, dict)
    answer = json.loads(run(python, "-c", CHECK, json.dumps(list(groups)), cwd=folder, quiet=True))
    if answer["found"] != groups:
        sys.exit(f"entry points must be those of pyproject.toml, got {answer['found']}")
    outside = [file for file in answer["files"] if not Path(file).is_relative_to(folder)]
    if outside:
        sys.exit(f"packages must come from the wheel in {folder}, got {outside}")
    print("entry points:", ", ".join(f"{len(names)} of {group}" for group, names in groups.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="keep the distributions in this folder")
    arguments = parser.parse_args()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        out = (arguments.out or folder / "dist").resolve()
        run(sys.executable, "-m", "build", "--outdir", out, ROOT, quiet=True)
        (wheel,), (source,) = out.glob(f"*-{project['version']}-*.whl"), out.glob(f"*-{project['version']}.tar.gz")
        run(sys.executable, "-m", "twine", "check", "--strict", wheel, source)
        check_contents(wheel, source)
        venv.create(folder / "venv", with_pip=True)
        python = folder / "venv" / "bin" / "python"
        run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", f"{wheel}{backend_extra()}")
        check_installed(python, folder, project)
        run(python.with_name("kvq"), "schemes", "--head-dim", "128", cwd=folder, quiet=True)
        for file in ("demo.py", "document.txt"):
            shutil.copy(ROOT / "examples" / file, folder)
        run(python, "demo.py", cwd=folder)
    print("the wheel works outside of the source tree")


if __name__ == "__main__":
    main()
