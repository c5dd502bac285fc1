"""How the widgets look: one style sheet, in JupyterLab's own colours, light and dark."""

from __future__ import annotations

import html

import ipywidgets as widgets

__all__ = ["COLORS", "MUTED", "STYLE", "action_button", "card", "error_html", "heading", "icon_button", "note_html"]

MUTED = "#757575"
COLORS = {"running": "#1565c0", "done": "#2e7d32", "stopped": "#b26a00", "failed": "#c62828"}

STYLE = """<style>
.tvmlab-card { border: 1px solid var(--jp-border-color2, #e0e0e0); border-radius: 6px; padding: 8px 12px 10px; }
.tvmlab-wide { max-width: 932px; box-sizing: border-box; }
.tvmlab-heading { font-weight: 600; letter-spacing: .02em; line-height: 28px; }
.tvmlab-bar { height: 4px; border-radius: 2px; background: var(--jp-border-color2, #e0e0e0); margin: 4px 0 2px; }
.tvmlab-bar > div { height: 4px; border-radius: 2px; }
.tvmlab-card .jupyter-widget-tab > .widget-tab-contents { border-width: 1px 0 0; padding: 8px 0 0; }
.tvmlab-card .jupyter-widget-tab > .lm-TabBar .lm-TabBar-tab { flex: 0 1 auto; }
.tvmlab-preset .widget-toggle-button.mod-active { background: #1565c0; color: white; box-shadow: none; }
.tvmlab-stale { opacity: .45; }
.tvmlab-table { border-collapse: collapse; line-height: 1.5; font-size: var(--jp-ui-font-size1, 13px); }
.tvmlab-table th { position: sticky; top: 0; background: var(--jp-layout-color0, white); font-weight: 600; }
.tvmlab-table th, .tvmlab-table td { text-align: right; padding: 1px 8px; white-space: nowrap; }
.tvmlab-table tbody tr:nth-child(even) { background: var(--jp-layout-color1, #f7f7f7); }
.tvmlab-table th:first-child, .tvmlab-table td:first-child, .tvmlab-tasks th:nth-child(2),
.tvmlab-tasks td:nth-child(2), .tvmlab-text th, .tvmlab-text td { text-align: left; }
.tvmlab-text td { white-space: normal; vertical-align: top; }
.tvmlab-tasks td:nth-child(-n+2) { max-width: 240px; overflow: hidden; text-overflow: ellipsis; }
.tvmlab-scroll { max-height: 300px; overflow: auto; max-width: 932px; }
.tvmlab-details summary { cursor: pointer; line-height: 1.8; }
</style>"""


def card(children: list[widgets.Widget], width: str) -> widgets.VBox:
    """Widgets below each other in a frame of their own."""
    box = widgets.VBox(children, layout={"width": width, "overflow": "hidden"})
    box.add_class("tvmlab-card")
    return box


def heading(text: str) -> widgets.HTML:
    """The title of a card."""
    return widgets.HTML(f"<div class='tvmlab-heading'>{html.escape(text)}</div>", layout={"margin": "0"})


def action_button(text: str, icon: str, tooltip: str, style: str = "") -> widgets.Button:
    """A button as wide as its neighbours; `style` is one of Jupyter's (`success`, `danger`, ...)."""
    return widgets.Button(description=text, icon=icon, tooltip=tooltip, button_style=style, layout={"width": "110px"})


def icon_button(icon: str, tooltip: str) -> widgets.Button:
    """A small button that shows an icon only."""
    return widgets.Button(icon=icon, tooltip=tooltip, layout={"width": "34px", "margin": "0 0 0 4px"})


def error_html(text: str) -> str:
    """An error message, in red, safe to put into a widget."""
    return _paragraph(text, COLORS["failed"])


def note_html(text: str) -> str:
    """A remark, in grey, safe to put into a widget."""
    return _paragraph(text, MUTED)


def _paragraph(text: str, color: str) -> str:
    return f"<div style='color:{color};line-height:1.4'>{html.escape(text)}</div>" if text else ""
