"""The finished model as plain weights, in models/BUDGET-dense/ or models/BUDGET-healed-dense/."""

from __future__ import annotations

from pathlib import Path

from rocket.compression import merge
from rocket.models import open_checkpoint
from rocket.session import Session
from rocket.stages.compress import compress_model
from rocket.stages.heal import heal_model


def export_dense(session: Session) -> Path:
    """The compressed model multiplied out, for engines that know nothing of rocket; healed, if the config heals."""
    heals = session.config.healing is not None
    path = heal_model(session) if heals else compress_model(session)
    name = f"{session.finished_checkpoint}-dense"
    expected = session.identity.dense
    if session.agree(session.run.has_directory(name, expected)):
        session.skip("export dense")
        return session.run.path / name
    if session.leads:
        with session.stage("export dense"), session.run.new_directory(name, expected) as directory:
            model, processor = open_checkpoint(path, session.config.model)
            merge(model, inplace=True).save_pretrained(directory)
            processor.save_pretrained(directory)
    session.wait()
    return session.run.path / name
