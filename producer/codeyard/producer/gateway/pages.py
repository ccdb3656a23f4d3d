"""The pages a browser sees: where to go, and the API reference rendered from the OpenAPI document.

Self-contained on purpose: no script, no asset from elsewhere, so it also reads on a machine without internet.
"""

import json
import re
from collections.abc import Iterable
from functools import cache
from html import escape
from typing import Any

from codeyard.producer.gateway.openapi import describe
from codeyard.producer.gateway.problems import KINDS

SHOWN_SCHEMAS = ("SubmitBody", "Sampling", "JobStatus", "Result", "Usage", "Failure", "Event", "Problem")


@cache
def landing_page() -> str:
    about = describe()["info"]
    links = (
        ("/docs", "API reference"),
        ("/openapi.json", "OpenAPI document"),
        ("/v1/jobs", "the newest jobs"),
        ("/readyz", "do broker and store answer?"),
        ("/metrics", "metrics"),
    )
    items = "".join(f'<li><a href="{path}"><code>{path}</code></a> {text}</li>' for path, text in links)
    return _page("codeyard", f"<h1>codeyard</h1><p>{_text(about['description'])}</p><ul>{items}</ul>")


@cache
def reference_page() -> str:
    document = describe()
    operations = [
        (method, path, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    contents = "".join(
        f'<tr><td>{_verb(method)}</td><td><a href="#{operation["operationId"]}"><code>{escape(path)}</code></a></td>'
        f"<td>{_text(operation['summary'])}</td></tr>"
        for method, path, operation in operations
    )
    return _page(
        "codeyard API",
        f"<h1>codeyard <small>{escape(document['info']['version'])}</small></h1>"
        f"<p>{_text(document['info']['description'])} <a href='/openapi.json'>OpenAPI document</a></p>"
        f"<table>{contents}</table>"
        + "".join(_operation(method, path, operation) for method, path, operation in operations)
        + "<h2>Objects</h2>"
        + "".join(_object(name, document["components"]["schemas"][name]) for name in SHOWN_SCHEMAS)
        + _problems(),
    )


def _operation(method: str, path: str, operation: dict[str, Any]) -> str:
    parts = [
        f'<section id="{operation["operationId"]}"><h2>{_verb(method)} <code>{escape(path)}</code></h2>'
        f"<p><b>{_text(operation['summary'])}.</b> {_text(operation.get('description', ''))}</p>"
    ]
    if parameters := operation.get("parameters"):
        rows = ((f"<code>{p['name']}</code>", p["in"], _text(p["description"])) for p in parameters)
        parts.append(_table(("parameter", "in", ""), rows))
    if body := operation.get("requestBody"):
        [content] = body["content"].values()
        parts.append(f"<h3>Body: {_type(content['schema'])}</h3>{_code(content['example'])}")
    refusals = []
    for status, answer in operation["responses"].items():
        contents = answer.get("content", {"": {}})
        if "application/problem+json" in contents:
            kinds = re.sub(r"`([^`]+)`", r'<a href="#\1">\1</a>', answer["description"])
            refusals.append(f"<code>{status}</code> {kinds}")
            continue
        if int(status) >= 400:  # of an API with refusals of its own
            refusals.append(f"<code>{status}</code> {_text(answer['description'])}")
            continue
        parts.append(
            f"<h3><code>{status}</code> {escape(' or '.join(contents))}</h3><p>{_text(answer['description'])}</p>"
        )
        parts += (_code(content["example"]) for content in contents.values() if "example" in content)
    if refusals:
        parts.append(f"<h3>Refusals</h3><p>{' · '.join(refusals)}</p>")
    return "".join(parts) + "</section>"


def _object(name: str, schema: dict[str, Any]) -> str:
    required = set(schema.get("required", ()))
    rows = (
        (f"<code>{field}</code>{'' if field in required else ' <i>optional</i>'}", _type(of), _meaning(of))
        for field, of in schema["properties"].items()
    )
    about = schema.get("description", "").partition("\n\n")[0]
    return f'<section id="{name}"><h3>{name}</h3><p>{_text(about)}</p>{_table(("field", "type", ""), rows)}</section>'


def _problems() -> str:
    rows = (
        (f'<code id="{name}">{name}</code>', str(kind.status), _text(kind.title), _text(kind.remedy))
        for name, kind in KINDS.items()
    )
    about = "Every refusal is <code>application/problem+json</code>; its <code>type</code> links here."
    return f"<h2>Problems</h2><p>{about}</p>{_table(('type', 'status', 'title', 'what to do'), rows)}"


# Pieces --------------------------------------------------------------------------------------------


def _type(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[1]
        target = describe()["components"]["schemas"][name]
        return (
            " | ".join(f"<code>{escape(str(one))}</code>" for one in target["enum"])
            if "enum" in target
            else _link(name)
        )
    for several in ("anyOf", "oneOf", "allOf"):
        if several in schema:
            return " or ".join(_type(one) for one in schema[several] if one.get("type") != "null")
    if "enum" in schema:
        return " | ".join(f"<code>{escape(str(one))}</code>" for one in schema["enum"])
    if schema.get("type") == "array":
        items = schema.get("items") or {}
        return f"list of {_type(items)}" if items else "list"
    return escape(str(schema.get("const", schema.get("type", "any"))))


def _meaning(schema: dict[str, Any]) -> str:
    text = _text(schema.get("description", ""))
    text += "." if text and not text.endswith(".") else ""
    default = schema.get("default")
    bounds = _bounds(schema)
    if default not in (None, "", [], {}) and not isinstance(default, dict):
        bounds.append(f"default <code>{escape(json.dumps(default))}</code>")
    return f"{text} {', '.join(bounds)}".strip()


def _bounds(schema: dict[str, Any]) -> list[str]:
    phrases = {
        "minimum": "at least {}",
        "exclusiveMinimum": "more than {}",
        "maximum": "at most {}",
        "exclusiveMaximum": "less than {}",
        "maxLength": "at most {} characters",
        "maxItems": "at most {} items",
    }
    numbers = [one for one in schema.get("anyOf", ()) if one.get("type") in ("number", "integer")]
    return [
        phrase.format(_number(one[bound]))
        for one in (schema, *numbers)
        for bound, phrase in phrases.items()
        if bound in one
    ]


def _number(value: float) -> str:
    power = int(value).bit_length() - 1
    if power > 20 and value == 2**power:
        return f"2<sup>{power}</sup>"
    return f"{int(value):,}" if value == int(value) else f"{value:g}"


def _verb(method: str) -> str:
    return f'<span class="verb {method}">{method.upper()}</span>'


def _link(name: str) -> str:
    return f'<a href="#{name}">{name}</a>' if name in SHOWN_SCHEMAS else escape(name)


def _text(text: str) -> str:
    """Escaped, with `code` in backticks."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text, quote=False))


def _code(example: Any) -> str:
    text = example if isinstance(example, str) else json.dumps(example, indent=2)
    return f"<pre>{escape(text, quote=False)}</pre>"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    titles = "".join(f"<th>{title}</th>" for title in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table>"


def _page(title: str, body: str) -> str:
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f"<body>{body}</body></html>\n"
    )


STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --link: #0b5fb0 }
@media (prefers-color-scheme: dark) { :root { --link: #7ab8f5 } }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 58rem; margin: 2rem auto; padding: 0 1rem }
h1 small { font-size: 1rem; font-weight: 400; opacity: .7 }
h2 { margin-top: 3rem; padding-top: .5rem; border-top: 1px solid var(--line) }
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem }
p { margin: .4rem 0 }
code, pre { font: .875em/1.5 ui-monospace, Menlo, Consolas, monospace }
code { background: var(--soft); padding: .1em .3em; border-radius: 3px }
pre { background: var(--soft); padding: .8rem 1rem; border-radius: 6px; overflow-x: auto }
table { border-collapse: collapse; width: 100%; margin: .6rem 0 }
th, td { text-align: left; vertical-align: top; padding: .35rem .6rem; border-bottom: 1px solid var(--line) }
th { font-weight: 600; font-size: .875rem }
a { color: var(--link) }
i { opacity: .7; font-size: .875rem }
.verb { display: inline-block; min-width: 4rem; text-align: center; font: 600 .75rem/1.6 system-ui, sans-serif;
  border-radius: 3px; color: #fff; background: #2f6fb2 }
.verb.post { background: #2c7a4b } .verb.delete { background: #b0413e }
:target { outline: 2px solid var(--link); outline-offset: 3px }
"""
