"""A joint run whose members learned elsewhere: what is trained once serves in many combinations."""

from collections.abc import Mapping

from torch import Tensor

from kizu_train.data import hold_out, open_data
from kizu_train.detectors.joint import JointDetector
from kizu_train.errors import UsageError
from kizu_train.fit import FitRequest, FitSession, choose_device, claim, finish, fingerprints
from kizu_train.progress import FitProgress
from kizu_train.runs import RunRecord, build_detector
from kizu_train.tile_size import fit_tiles


def join_adopted(request: FitRequest, learned: Mapping[str, Mapping[str, Tensor]]) -> RunRecord:
    """Write the run of a joint recipe whose members take up what `learned` holds of each, by the member's name.

    They must have learned from the same pictures with the same seed, by the recipe's own members; the held-out
    pictures then settle and calibrate them together as after a fit. Raises UsageError for another kind of recipe or a
    member that is missing, TrainError and DataError as `fit`.
    """
    claim(request)
    pictures = open_data(request.data, request.recipe.data.colour, with_tests=False)
    recipe = fit_tiles(request.recipe, pictures)
    settings = recipe.data
    split = hold_out(pictures, request.seed, settings.held_out_share, settings.held_out_at_least)
    detector = build_detector(recipe, pictures.colour, request.seed)
    if not isinstance(detector, JointDetector):
        raise UsageError(f"recipe {recipe.name} joins no members")
    for member in detector.members:
        if member.name not in learned:
            raise UsageError(f"member {member.name} of {recipe.name} has not learned yet")
        detector.adopt(member.name, learned[member.name])
    request.out.mkdir(parents=True, exist_ok=True)
    session = FitSession(
        request, choose_device(request.device), fingerprints(request.extras, pictures), FitProgress(), lambda: False
    )
    return finish(request, recipe, pictures, split, detector, session)
