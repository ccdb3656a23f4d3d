"""Where a JSON object ends, found while it comes. Called by: the readers of calls (`hermes`, `forced`)."""


class JsonObject:
    """One object, from its opening brace. Says nothing about whether what is inside is right."""

    def __init__(self) -> None:
        self.ended = False
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def take(self, text: str) -> int:
        """How many of the characters, which follow those of earlier calls, belong to it. A `<` outside a string
        is no JSON: it ends the object there."""
        for at, character in enumerate(text):
            if self.ended:
                return at
            if self._in_string:
                self._string(character)
            elif character == "<":
                self.ended = True
                return at
            else:
                self._structure(character)
        return len(text)

    def _string(self, character: str) -> None:
        if self._escaped:
            self._escaped = False
        elif character == "\\":
            self._escaped = True
        elif character == '"':
            self._in_string = False

    def _structure(self, character: str) -> None:
        if character == '"':
            self._in_string = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
            self.ended = self._depth == 0
