"""What moves through the pipeline, who works on it, models and workloads.

"The paper" is Zhang et al., Accelerating Iterative Retrieval-augmented Language Model Serving with Speculation
(RaLMSpec), ICML 2024, arXiv 2401.14021.

The graph of the stages has a cycle: verdicts flow back and rollbacks make new work. A naive cycle of bounded queues
stops for ever, because one rollback makes several messages. These rules keep it alive; the code cites them by number,
and a test holds each.

R1   Admission is one synchronous section: check for a slot, register, enqueue. Who finds none waits in front of it, in
     a room that is bounded too; where that is full, or waiting would be in vain: `Overloaded`, at once.
R2   One owner: a session's state changes only in its own sections, on the loop. Threads get immutable inputs. Only
     the caches and the KV memory are theirs: locked, and what they hold changes no output: a cache guesses, and what
     it proves is true whatever else it holds.
R3   A rollback is a write, not a message: the epoch rises, what was speculated goes, the true document stands. No wait.
R4   Stale is harmless: whatever moves names (session, epoch); ids are never used again; what does not match is dropped.
R5   Credits follow checks: at most K in flight a session, the largest window it may be given, stale ones included, in
     so many batches as its arrangements allow; a credit returns with the turn that brought its batch to Verify,
     whatever happened.
R6   A slot is free only when everything is home: final status, no turn, no credit, no thread call, no end on its way.
R7   Queues carry turns and hold as many as can be out: one a session, at Verify one for each batch in flight. So no
     send inside the cycle ever waits. A full queue is a bug, and says so.
R8   The caller never holds a stage: events wait in a sink of the session's own; too many stop new work of that session.
R9   Exactly one end: the first `finish` wins. A stream ends with `Done`, and any other end raises.
R10  Fault scope: one session's fault fails that session. A call that several share and that raises is repeated once
     for each of them alone, so only those fail whose own call does. A dead stage, or a thread that hangs, is the death
     of the engine: it fails all, refuses new ones, and is no longer ready.
R11  Draining: admission off, let sessions end until a deadline, finish the rest, wait for thread calls, close.
R12  Watchdog: a session for which nothing happens although something could is failed, and its state is named.

Why it cannot deadlock: by R5 to R7 no send waits, so a stage waits only for its inbox or for a call that ends; and
every live session that could act has a turn out, checks flying, or a full sink whose reader wakes it. Why it ends:
the step after a rollback stands under the true document, so every epoch commits at least one step. Why nothing is
lost: only steps that are verified or proven, in order, are committed, and each is what the sequential loop would have
made.
"""
