"""What the README shows runs as it stands."""

import re
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"


def test_code_blocks_run():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 2
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    decoder = names["decoder"]
    assert all(parameter.grad is not None for parameter in decoder.parameters())


def test_public_names_exist():
    import fastvae

    for name in re.findall(r"`(?:fastvae\.)((?:\w+\.)*\w+)", README.read_text()):
        found = fastvae
        for part in name.split("."):
            found = getattr(found, part)
