"""An answer on a terminal while it is being made: verified text plain, drafts dim, retracted drafts struck out."""

from rich.text import Text

from ralmspec.stages.messages import Committed, Drafted, Event, RolledBack, Source


class Transcript:
    """A rich renderable that follows a session's events."""

    def __init__(self) -> None:
        self.documents: dict[int, Source] = {}
        """Documents that committed steps were written under, in order of first use."""
        self._committed = Text()
        self._drafted: list[tuple[int, str]] = []
        self._retracted = Text()

    def show(self, event: Event) -> None:
        """Take in the next event."""
        match event:
            case Committed(text=text, step=step, document=document):
                self.documents.setdefault(document.id, document)
                self._committed.append(text)
                self._drafted = [(s, t) for s, t in self._drafted if s > step]
                self._retracted = Text()
            case Drafted(text=text, step=step):
                self._drafted.append((step, text))
            case RolledBack(step=step):
                struck = "".join(t for s, t in self._drafted if s >= step)
                self._drafted = [(s, t) for s, t in self._drafted if s < step]
                self._retracted = Text(struck, style="red strike")

    def __rich__(self) -> Text:
        drafts = Text("".join(text for _, text in self._drafted), style="dim")
        return Text.assemble(self._committed, drafts, self._retracted)
