"""Files that a setting names, read with an error that says which setting to correct."""

import tomllib
from pathlib import Path

from appliance.contract.errors import TheirsError, WorldError
from appliance.core.serve.board import BoardProfile, parse_board


def read(path: Path, setting: str) -> bytes:
    """The bytes of a file that a setting names. Raises: WorldError (`unreadable`)."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise WorldError(
            "unreadable", f"cannot be read: {error.strerror}", where=str(path), remedy=f"put the file there, or correct {setting}"
        ) from error


def read_profile(path: str) -> BoardProfile | None:
    """The board's data that `board.profile` names; None if it names none. Raises: WorldError (`unreadable`), TheirsError (`board_profile`)."""
    if not path:
        return None
    try:
        return parse_board(tomllib.loads(read(Path(path), "board.profile").decode()), path)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise TheirsError("board_profile", f"not TOML: {error}", where=path, remedy="take one of bsp/jetson/profiles") from error
