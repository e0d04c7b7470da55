"""A process of its own: a named data set becomes lines of text, chosen and joined by ModelOpt's loader.

``python -m dsqjob.tokens.hub_import NAME COUNT RELEASE TARGET``; on failure the last line of stderr is
``id<TAB>what`` and the exit code 64 or 69.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NoReturn

from dsqjob.errors import DsqjobError, PeerError, UsageError
from dsqjob.tokens.tokenizer import release_chat


class _Chat:
    """What ModelOpt calls of a tokenizer for a data set of messages that it does not know by name."""

    def __init__(self, release: Path, name: str) -> None:
        self._release, self._name = release, name

    def apply_chat_template(self, messages: list[Any], *, tokenize: bool, tools: Any = None) -> str:  # noqa: ARG002
        return release_chat(self._release).render(messages, tools, self._name)


def texts(name: str, count: int, release: Path) -> list[str]:
    """The samples as the reference would tokenize them. UsageError ``hub-packages``, ``hub-dataset``,
    PeerError ``hub-unreachable``."""
    try:
        from modelopt.torch.utils.dataset_utils import get_dataset_samples

        found: list[str] = get_dataset_samples(name, count, tokenizer=_Chat(release, name))
    except DsqjobError:
        raise
    except ImportError as error:
        raise UsageError("hub-packages", f"named data sets need the package {error.name}") from None
    except (ConnectionError, TimeoutError) as error:
        raise PeerError("hub-unreachable", f"the Hub cannot be reached: {_one_line(error)}") from None
    except Exception as error:  # whatever the Hub's libraries raise for a name that is wrong, or closed to us
        raise UsageError("hub-dataset", f"ModelOpt's loader refuses it: {_one_line(error)}") from None
    return found


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def main(arguments: list[str]) -> NoReturn:
    name, count, release, target = arguments
    try:
        found = texts(name, int(count), Path(release))
    except DsqjobError as error:
        print(f"{error.id}\t{_one_line(Exception(error.what))}", file=sys.stderr)
        sys.exit(error.exit_code)
    with Path(target).open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in found)
    sys.exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
