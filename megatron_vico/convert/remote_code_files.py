"""Puts the model code of remote_code/ beside exported weights, for `trust_remote_code=True`."""

import shutil
from pathlib import Path

AUTO_MAP = {
    "AutoConfig": "configuration_internvl_chat.InternVLChatConfig",
    "AutoModel": "modeling_internvl_chat.InternVLChatModel",
    "AutoModelForCausalLM": "modeling_internvl_chat.InternVLChatModel",
}
"""`auto_map` of config.json: which class of which file transformers loads."""

_SOURCE = Path(__file__).with_name("remote_code")


def write_remote_code(folder: Path) -> None:
    """Copy the model code, verbatim, into an export in the internvl or flash layout."""
    for path in _SOURCE.glob("*.py"):
        if path.name != "__init__.py":
            shutil.copyfile(path, folder / path.name)
