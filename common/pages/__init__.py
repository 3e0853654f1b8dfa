"""What every page of Cloister is made of: one layout, one stylesheet, charts drawn as SVG on the server.

A page works offline and asks no other host for anything; it can be read in light and dark, on paper and on a phone,
with a keyboard and with a screen reader. Colours come from the stylesheet alone, so a strict Content-Security-Policy
needs no exception. Every figure of a chart stands in the document as well (``data-value`` and a table below it).

    environment("server.dashboard")        a Jinja2 environment; templates extend ``pages/layout.html``
    line_chart(...), column_chart(...)     figures: SVG, legend and the same numbers as a table
    asset("pages.css"), asset("live.js")   what a page links to; ``stylesheet()`` to put it into one file

>>> chart = line_chart([Series("clinic-a", [(0, 0.0), (1, 1.25)])], name="epsilon", title="ε per round", y_label="ε")
>>> 'data-x="1" data-value="1.25"' in chart
True
"""

from common.pages.assets import Asset, asset, stylesheet
from common.pages.charts import Series, column_chart, line_chart
from common.pages.layout import ago, environment, rounded_up, when

__all__ = [
    "Asset",
    "Series",
    "ago",
    "asset",
    "column_chart",
    "environment",
    "line_chart",
    "rounded_up",
    "stylesheet",
    "when",
]
