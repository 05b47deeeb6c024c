"""The questions to the annotator: Jinja templates in versioned folders.

`prompts/v1/<question>.jinja` is one user message; `system.jinja` is the system message of all. Everything that comes
from a trace stands behind line numbers or marks, and the system message says that it is data. A folder of one's own
with the same file names replaces them (`--prompts DIR`); the digest of all files is part of a job's settings.
"""

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2

from tw_recipes.datagen.numbering import quoted

QUESTIONS = ("steps", "blocks", "check", "rewrite", "outlines")
DEFAULT = "v1"
_HERE = Path(__file__).parent / "prompts"


class Prompts:
    """The templates of one version.

    Args:
        version: A folder in `prompts`, or the path of a folder.
    Raises:
        ValueError: A template is missing.
    """

    def __init__(self, version: str = DEFAULT):
        packaged = _HERE / version
        self.folder = packaged if packaged.is_dir() else Path(version)
        missing = [name for name in ("system", *QUESTIONS) if not (self.folder / f"{name}.jinja").is_file()]
        if missing:
            raise ValueError(
                f"prompts must be one of {', '.join(sorted(p.name for p in _HERE.iterdir()))} or a folder with a "
                f"template for each of system, {', '.join(QUESTIONS)}; {self.folder} lacks {', '.join(missing)}.jinja"
            )
        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(self.folder),
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            autoescape=False,
            auto_reload=False,
        )
        environment.filters["quoted"] = quoted
        self._templates = {name: environment.get_template(f"{name}.jinja") for name in ("system", *QUESTIONS)}

    @cached_property
    def digest(self) -> str:
        """Changes with any byte of any template."""
        found = hashlib.blake2b(digest_size=8)
        for path in sorted(self.folder.glob("*.jinja")):
            found.update(f"{path.name}\0{path.read_text(encoding='utf-8')}\0".encode())
        return found.hexdigest()

    @cached_property
    def system(self) -> str:
        """The system message."""
        return self._templates["system"].render()

    def render(self, template: str, /, **values: Any) -> str:
        """The user message of one of `QUESTIONS`."""
        return self._templates[template].render(**values)
