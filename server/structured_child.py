"""Reads a JSON schema and one answer, in a process of its own that may be killed: both can take for ever, or the stack with them.

Run as a file, not as a module, and imports nothing of the gateway. Reads one JSON line from stdin, the schema, and prints one, what
is wrong with it or null; then the same for the answer's text. Ends when stdin does: the gateway is gone, or wants no more.
"""

from __future__ import annotations

import json
import resource
import sys
from typing import Any

import jsonschema_rs

MAX_BYTES = 1 << 30
"""Address space: a schema of many patterns can want more than any machine has."""
MAX_MESSAGE_CHARS = 300


def bound() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a stack that ran over is nothing to keep


def say(problem: str | None) -> None:
    print(json.dumps(problem and problem.partition("\n")[0][:MAX_MESSAGE_CHARS]), flush=True)


def wrong(text: str, schema: jsonschema_rs.Validator) -> str | None:
    """Why `text` is not JSON that meets the schema; None: it is."""
    try:
        tree: Any = json.loads(text)
    except RecursionError:
        return "it is nested too deeply"
    except ValueError as error:
        return f"no JSON: {error}"
    try:
        schema.validate(tree)
    except jsonschema_rs.ValidationError as error:
        return error.message
    except ValueError as error:  # deeper than the library goes
        return str(error)
    return None


def main() -> None:
    bound()
    wished = json.loads(sys.stdin.readline())
    try:  # nothing is fetched, and patterns take linear time
        schema = jsonschema_rs.validator_for(wished, offline=True, pattern_options=jsonschema_rs.RegexOptions())
    except (ValueError, jsonschema_rs.ReferencingError) as error:
        say(str(error))
        return
    say(None)
    if line := sys.stdin.readline():
        say(wrong(json.loads(line), schema))


if __name__ == "__main__":
    main()
