"""The healed checkpoint, in models/BUDGET-healed/."""

from __future__ import annotations

from pathlib import Path

from rocket.config import RocketError
from rocket.reporting.card import model_card
from rocket.run import UNCHECKED
from rocket.session import Session
from rocket.stages.compress import compress_model
from rocket.stages.material import healing_examples
from rocket.stages.profile import make_plan


def heal_model(session: Session) -> Path:
    """The compressed model, fine-tuned with its sparsity kept, as the config's healing section says.

    Writes models/BUDGET-healed/, and healing/BUDGET/ while it is at work: a killed run goes on from there. Costs what
    ``healing.tokens`` or ``healing.minutes`` allow; memory: `rocket.healing.heal`.
    """
    from rocket.healing import heal  # here, as the Trainer takes seconds to import

    config, run = session.config, session.run
    if config.healing is None:
        raise RocketError("the config has no healing section; add one, or say for example --set healing.minutes=20")
    compressed, healed = compress_model(session), run.path / session.healed_checkpoint
    expected, scratch = session.identity.healed, f"healing/{session.budget.name}"
    if run.has_directory(session.healed_checkpoint, expected):
        session.skip("heal")
        run.remove(scratch)  # of a process that was killed when the checkpoint was complete
        return healed
    examples, plan = healing_examples(session, config.healing), make_plan(session)
    session.release_model()
    with session.stage("heal"), run.new_directory(session.healed_checkpoint, expected) as directory:
        heal(compressed, config.model, config.healing, examples, run.path / scratch / expected, directory)
        card = model_card(directory, config, plan, healed=True)
        (directory / UNCHECKED).write_text(card, encoding="utf-8")
    run.remove(scratch)
    return healed
