"""Reports: the text table, the dictionary and the page."""

import html.parser
import json

import pytest

from nsa_compile import NSAConfig, RewriteReport, SiteReport
from nsa_compile.report import GraphReport
from nsa_compile.report_text import difference, ranges, table


def site(module, *, decision="rewritten", reason="", sentence="", mask="causal", proof=(), heads=4, **more):
    shapes = {"query": f"[1, {heads}, 2048, 64]", "key": "[1, 2, 2048, 64]", "value": "[1, 2, 2048, 64]"}
    return SiteReport(
        module=module,
        spelling="F.scaled_dot_product_attention",
        mask=mask,
        proof=proof,
        shapes=shapes,
        decision=decision,
        reason=reason,
        sentence=sentence,
        **more,
    )


def report():
    padded = {"mask": "causal, padding", "proof": ("key ≤ query: the mask compares two aranges.",)}
    sites = (
        *(site(f"model.layers.{i}.self_attn", **padded) for i in range(3)),
        site("model.layers.3.self_attn", decision="declined", reason="DROPOUT", sentence="dropout_p is 0.1.", **padded),
        site("encoder", decision="declined", reason="BIDIRECTIONAL", sentence="There is no mask.", mask="all keys"),
    )
    return RewriteReport(NSAConfig(), sites, (GraphReport("a = 1\nb = 2", "a = 1\nb = 3"),), ("One note.",))


def test_text():
    assert str(report()) == (
        "3 of 5 attentions rewritten (joint; blocks of 64, 16 selected, window 512, compression 32/16)\n"
        "\n"
        "module                            spelling                        mask             "
        "shapes                                              decision   reason\n"
        "model.layers.{0-2}.self_attn (3)  F.scaled_dot_product_attention  causal, padding  "
        "query [1, 4, 2048, 64]  key,value [1, 2, 2048, 64]  rewritten\n"
        "model.layers.3.self_attn          F.scaled_dot_product_attention  causal, padding  "
        "query [1, 4, 2048, 64]  key,value [1, 2, 2048, 64]  declined   DROPOUT\n"
        "encoder                           F.scaled_dot_product_attention  all keys         "
        "query [1, 4, 2048, 64]  key,value [1, 2, 2048, 64]  declined   BIDIRECTIONAL\n"
        "\n"
        "masks (query i, key j):\n"
        "  causal, padding: key ≤ query: the mask compares two aranges.\n"
        "\n"
        "reasons:\n"
        "  DROPOUT: dropout_p is 0.1.\n"
        "  BIDIRECTIONAL: There is no mask.\n"
        "\n"
        "notes:\n"
        "  One note."
    )


def test_text_without_attention():
    text = str(RewriteReport(NSAConfig(combine="gated")))
    assert text == "0 of 0 attentions rewritten (gated; blocks of 64, 16 selected, window 512, compression 32/16)"


def test_text_of_several_graphs():
    graphs = (GraphReport(break_reason="a print"), GraphReport())
    text = str(RewriteReport(NSAConfig(), (site(""),), graphs))
    assert text.startswith("1 of 1 attention rewritten, in 2 graphs (")
    assert "\n(root)  " in text
    assert text.endswith("graph breaks:\n  a print")


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        (["layers.0.attn", "layers.1.attn", "layers.2.attn"], ["layers.{0-2}.attn (3)"]),
        (["layers.0.attn", "layers.0.attn"], ["layers.0.attn (2)"]),
        (["layers.0.attn", "layers.7.attn", "head"], ["layers.{0,7}.attn (2)", "head"]),
        ([f"stages.{i}.blocks.{j}.attn" for i in (0, 1) for j in (0, 1)], ["stages.{0-1}.blocks.{0-1}.attn (4)"]),
        (["a.0.b.1.c", "a.1.b.2.c"], ["a.0.b.1.c", "a.1.b.2.c"]),
        (["", ""], ["(root) (2)"]),
    ],
)
def test_layers_that_differ_in_a_number_share_a_row(modules, expected):
    assert [row.cells[0] for row in table(map(site, modules))] == expected


def test_layers_that_differ_in_more_have_rows_of_their_own():
    rows = table([site("layers.0.attn"), site("layers.1.attn", heads=8), site("layers.2.attn", mask="all keys")])
    assert [len(row.sites) for row in rows] == [1, 1, 1]


def test_ranges():
    assert ranges([5, 0, 1, 2, 7, 8]) == "{0-2,5,7-8}"


def test_dictionary_is_json():
    made = report()
    read = json.loads(json.dumps(made.to_dict()))
    assert (read["rewritten"], read["declined"]) == (3, 2)
    assert NSAConfig(**read["config"]) == NSAConfig()
    assert read["sites"][3]["reason"] == "DROPOUT"
    assert read["sites"][0]["shapes"] == {
        "query": "[1, 4, 2048, 64]",
        "key": "[1, 2, 2048, 64]",
        "value": "[1, 2, 2048, 64]",
    }
    assert "before" not in read["graphs"][0]
    assert made.to_dict(graphs=True)["graphs"][0]["after"] == "a = 1\nb = 3"


def test_difference():
    assert difference(report().graphs[0]).splitlines()[3:] == [" a = 1", "-b = 2", "+b = 3"]
    assert difference(GraphReport("a", "a")) == ""


class Page(html.parser.HTMLParser):
    """Reads a page's text, and checks that every tag is closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_page_is_whole_and_escapes(tmp_path):
    made = report()
    hostile = "<script>alert('x')</script> & more"
    made = made.with_note(hostile)
    made = RewriteReport(
        made.config,
        (*made.sites, site(hostile, decision="declined", reason="DROPOUT", sentence=hostile, stack_trace=hostile)),
        (GraphReport(hostile, hostile + "!", hostile),),
        made.notes,
    )
    path = made.to_html(tmp_path / "report.html")
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert "script" not in page.tags
    assert "src=" not in text
    assert "href=" not in text
    assert any(hostile in words for words in page.words)
    joined = "".join(page.words)
    for expected in ("model.layers.{0-2}.self_attn (3)", "BIDIRECTIONAL", "One note.", "key ≤ query"):
        assert expected in joined
