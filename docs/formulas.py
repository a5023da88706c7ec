"""Formulas as MathML, which browsers draw themselves: nothing is loaded from elsewhere, so the site works offline."""

from docutils.nodes import SkipNode
from docutils.utils.math.latex2mathml import tex2mathml


def _inline(translator, node) -> None:
    translator.body.append(tex2mathml(node.astext()))
    raise SkipNode


def _block(translator, node) -> None:
    translator.body.append(f"<p>{tex2mathml(node.astext(), as_block=True)}</p>")
    raise SkipNode


def setup(app) -> dict[str, bool]:
    """Make it a renderer that `html_math_renderer` can name."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    return {"parallel_read_safe": True}
