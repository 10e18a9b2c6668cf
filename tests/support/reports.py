"""Records and results for a report, and the HTML that it must be."""

from html.parser import HTMLParser

from layerwise.run.pipeline.records import LayerRecord

VOID = {"meta", "wbr", "br", "link", "img", "input", "hr"}
KINDS = {"self_attn.q_proj": (64, 64), "mlp.up_proj": (176, 64), "mlp.down_proj": (64, 176)}
HOSTILE = '<script>alert("x")</script>&amp;\' $x_1$ --><img src=http://e.org/a.png>'


class Document(HTMLParser):
    """A page read strictly: what is open must be closed, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.marked: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"an attribute of {tag} is given twice"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "script" in self.open or "style" in self.open:
            return
        self.text += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data
            if "best" in (self.tags[-1][1].get("class") or ""):
                self.marked.append(data)

    def attributes(self, name: str) -> list[str]:
        return [value for _, found in self.tags if (value := found.get(name)) is not None]


def record(name: str, error: float, shape: tuple[int, int] = (64, 64)) -> LayerRecord:
    return LayerRecord(
        name=name,
        shape=shape,
        method="wanda",
        pattern="2:4",
        sparsity=0.5,
        relative_error=error,
        status="feasible",
        certificate=None,
        certificate_kind=None,
        damping=0.01,
        damping_raised=False,
        rank=shape[1],
        dead_channels=0,
        n_tokens=4096,
        iterations=0,
        seconds=0.0125,
    )


def layers(scale: float = 1.0, blocks: int = 3) -> tuple[LayerRecord, ...]:
    return tuple(
        record(f"model.layers.{block}.{kind}", scale * (0.05 + 0.07 * i + 0.01 * block), s)
        for block in range(blocks)
        for i, (kind, s) in enumerate(KINDS.items())
    )
