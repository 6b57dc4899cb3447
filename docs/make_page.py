"""Writes the page that notebooks link to: the documentation of all that is public, as it stands.

    python docs/make_page.py

It is part of the package, so that the link works offline and shows the version that is installed.
"""

import html
import inspect
from pathlib import Path

import sklearn_sela
from sklearn_sela import SelfLabelClusterer, display, evaluation, metrics

PAGE = Path(sklearn_sela.__file__).with_name("documentation.html")
STYLE = "body{max-width:60em;margin:2em auto;padding:0 1em;font-family:sans-serif}"
STYLE += "pre{white-space:pre-wrap;font-size:14px;line-height:1.4}"


def section(name: str, thing: object) -> str:
    """A heading with its signature, and the docstring as it is written."""
    signature = html.escape(str(inspect.signature(thing))) if callable(thing) else ""
    text = html.escape(inspect.getdoc(thing) or "")
    return f'<h2 id="{name}">{name}</h2>\n<p><code>{signature}</code></p>\n<pre>{text}</pre>'


def page() -> str:
    methods = {
        f"SelfLabelClusterer.{name}": method
        for name, method in inspect.getmembers(SelfLabelClusterer, inspect.isroutine)
        if name in vars(SelfLabelClusterer) and not name.startswith("_")
    }
    things = {"SelfLabelClusterer": SelfLabelClusterer, **methods}
    things |= {name: getattr(sklearn_sela, name) for name in sorted(sklearn_sela.__all__)[1:]}
    for module in (metrics, evaluation, display):
        known = getattr(module, "__all__", None)
        things |= {
            f"{module.__name__.split('.')[1]}.{name}": thing
            for name, thing in inspect.getmembers(module, callable)
            if (thing.__module__ == module.__name__ if known is None else name in known)
            and not name.startswith("_")
        }
    sections = "\n".join(section(name, thing) for name, thing in things.items())
    title = f"sklearn_sela {sklearn_sela.__version__}"
    head = f'<meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    body = f"<body>\n<h1>{title}</h1>\n{sections}\n</body>"
    return f"<!DOCTYPE html>\n<html><head>{head}</head>{body}</html>\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{PAGE.name}: {PAGE.stat().st_size} bytes")
