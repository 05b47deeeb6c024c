"""One row of a data set, in any accepted format, -> `ReasoningTrie`.

    {"prompt": str, "text": str}                 fork/join text; loss on what the model writes
    {"messages": [{"role", "content"}, ...][, "tools"]}     chat; every assistant turn is trained, from its own context
    {"units": [[context ids, completion ids], …]}
    {"sequences": [[ids], …], "loss_masks": [[0/1], …]}     loss_masks may be missing: all but the first token

Prompts are encoded apart and never parsed: tags inside a user's question are not structure.
"""

from collections.abc import Mapping
from typing import Any

from tw_core import ReasoningTrie, Unit, check_format, encode_units
from tw_core.errors import GrammarError, TrieError

FORMATS = '{"prompt", "text"}, {"messages"}, {"units"} or {"sequences"[, "loss_masks"]}'


class RowError(TrieError):
    """A row that cannot be trained on; `kind` groups rows for the statistics."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


def row_format(columns: Any) -> str:
    """The column that decides how rows with these columns are read.

    Raises:
        RowError: No accepted format has these columns.
    """
    columns = set(columns)
    for name, needed in (
        ("units", {"units"}),
        ("sequences", {"sequences"}),
        ("messages", {"messages"}),
        ("text", {"prompt", "text"}),
    ):
        if needed <= columns:
            return name
    raise RowError("columns", f"expected columns {FORMATS}, got {sorted(columns)}; rename or map the columns")


def row_to_trie(row: Mapping[str, Any], tokenizer: Any = None) -> ReasoningTrie:
    """Build the trie of one data set row.

    Args:
        row: See the module docstring. Columns that are None count as absent.
        tokenizer: For text and messages; its tags must be single tokens (`add_tag_tokens`).

    Raises:
        RowError: The row has none of the formats, malformed text, or nothing to train.
    """
    row = {name: value for name, value in row.items() if value is not None}
    kind = row_format(row)
    if kind == "sequences":
        trie = ReasoningTrie.from_sequences(row["sequences"], row.get("loss_masks"))
    elif kind == "units":
        trie = ReasoningTrie.from_units(row["units"])
    else:
        if tokenizer is None:
            raise RowError("tokenizer", f"rows with {kind!r} need a tokenizer; pass one to the collator or trainer")
        if kind == "messages":
            turns = chat_turns(row["messages"], tokenizer, row.get("tools"))
        else:
            for name in ("prompt", "text"):
                if not isinstance(row[name], str):
                    got = type(row[name]).__name__
                    raise RowError(name, f"{name} must be a string, got {got}; a chat goes into the column messages")
            turns = [(row["prompt"], row["text"])]
        trie = ReasoningTrie.from_units(
            [unit for prompt, text in turns for unit in text_units(prompt, text, tokenizer)]
        )
    return trie


def text_units(prompt: str, text: str, tokenizer: Any) -> list[Unit]:
    """Units of one response; the tokenizer's end-of-sequence token closes the last one."""
    problems = check_format(text).problems
    if problems:
        first = problems[0]
        raise RowError(first.kind, f"malformed fork/join text at offset {first.offset}: {first.message}")
    try:
        units = encode_units(text, tokenizer, prompt=prompt)
    except GrammarError as error:
        raise RowError("grammar", str(error)) from error
    if not units:
        raise RowError("empty", "the text is empty, so nothing is trained")
    last, end = units[-1], tokenizer.eos_token_id
    if end is not None and (len(last.completion) == 0 or last.completion[-1] != end):
        units[-1] = Unit(last.context, [*last.completion, end])
    return units


def chat_turns(messages: list[Mapping[str, Any]], tokenizer: Any, tools: Any = None) -> list[tuple[str, str]]:
    """(rendered context, written text) of each assistant turn.

    The context is what the chat template gives an inference engine before that turn, so templates that drop the
    reasoning of earlier turns are trained as they are used; the trie shares what the contexts share.

    Raises:
        RowError: The messages are no turns with roles, hold no assistant turn, or their template refuses them.
    """
    if not all(isinstance(message, Mapping) and "role" in message and "content" in message for message in messages):
        raise RowError("messages", "messages must be a list of turns {role, content}; repair the row")
    turns = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        try:
            prompt = tokenizer.apply_chat_template(
                messages[:index], tools=tools, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # whatever a template raises: roles that do not alternate, nothing to answer
            raise RowError(
                "chat_template", f"the chat template refuses the {index} turns before an assistant turn: {error}"
            ) from error
        text = message["content"]
        if not isinstance(text, str):
            raise RowError("content", f"the content of an assistant turn must be a string, got {type(text).__name__}")
        if message.get("reasoning_content"):
            text = f"<think>\n{message['reasoning_content']}\n</think>\n\n{text}"
        # Some templates open the reasoning themselves.
        opener = prompt[prompt.rfind("<think>") :] if "<think>" in prompt else ""
        if opener and "</think>" not in opener and text.startswith(opener):
            text = text[len(opener) :]
        turns.append((prompt, text))
    if not turns:
        raise RowError("no_assistant_turn", "messages hold no assistant turn, so nothing is trained")
    return turns
