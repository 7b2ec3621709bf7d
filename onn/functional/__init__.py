"""What a notebook imports as `F`, all pure: routing, experts, surprise, consolidation, integrity, losses, lifecycle."""

from onn.functional.consolidation import (
    centre_inputs as centre_inputs,
)
from onn.functional.consolidation import (
    consolidate as consolidate,
)
from onn.functional.consolidation import (
    expert_means as expert_means,
)
from onn.functional.consolidation import (
    matrix_shares as matrix_shares,
)
from onn.functional.consolidation import (
    whiten_inputs as whiten_inputs,
)
from onn.functional.consolidation import (
    whitening as whitening,
)
from onn.functional.experts import (
    BankGrads as BankGrads,
)
from onn.functional.experts import (
    TapName as TapName,
)
from onn.functional.experts import (
    bank as bank,
)
from onn.functional.experts import (
    bank_forward as bank_forward,
)
from onn.functional.experts import (
    bank_local as bank_local,
)
from onn.functional.experts import (
    bank_vjp as bank_vjp,
)
from onn.functional.experts import (
    zero_taps as zero_taps,
)
from onn.functional.integrity import (
    adaptive_mix as adaptive_mix,
)
from onn.functional.integrity import (
    integrity_integral as integrity_integral,
)
from onn.functional.integrity import (
    predictive_integrity as predictive_integrity,
)
from onn.functional.integrity import (
    token_entropy as token_entropy,
)
from onn.functional.kernels.backends import (
    Backend as Backend,
)
from onn.functional.kernels.backends import (
    Bounded as Bounded,
)
from onn.functional.kernels.tilings import (
    Tiling as Tiling,
)
from onn.functional.lifecycle import (
    Heirs as Heirs,
)
from onn.functional.lifecycle import (
    Usage as Usage,
)
from onn.functional.lifecycle import (
    forget_reborn as forget_reborn,
)
from onn.functional.lifecycle import (
    grow as grow,
)
from onn.functional.lifecycle import (
    heirs as heirs,
)
from onn.functional.lifecycle import (
    prune as prune,
)
from onn.functional.lifecycle import (
    rebirth as rebirth,
)
from onn.functional.lifecycle import (
    usage as usage,
)
from onn.functional.losses import (
    GateAccuracy as GateAccuracy,
)
from onn.functional.losses import (
    diversity_loss as diversity_loss,
)
from onn.functional.losses import (
    expected_surprise as expected_surprise,
)
from onn.functional.losses import (
    gate_accuracy as gate_accuracy,
)
from onn.functional.losses import (
    load_balance_loss as load_balance_loss,
)
from onn.functional.losses import (
    router_loss as router_loss,
)
from onn.functional.losses import (
    simplicity_loss as simplicity_loss,
)
from onn.functional.losses import (
    z_loss as z_loss,
)
from onn.functional.routing import (
    balance_bias as balance_bias,
)
from onn.functional.routing import (
    biased_top_k_route as biased_top_k_route,
)
from onn.functional.routing import (
    cosine_affinity as cosine_affinity,
)
from onn.functional.routing import (
    expert_choice_route as expert_choice_route,
)
from onn.functional.routing import (
    first_k as first_k,
)
from onn.functional.routing import (
    relu_route as relu_route,
)
from onn.functional.routing import (
    share_threshold_shift as share_threshold_shift,
)
from onn.functional.routing import (
    sparsity_coefficient as sparsity_coefficient,
)
from onn.functional.routing import (
    threshold_route as threshold_route,
)
from onn.functional.routing import (
    top_k_route as top_k_route,
)
from onn.functional.routing import (
    top_p_route as top_p_route,
)
from onn.functional.surprise import (
    bias_gradients as bias_gradients,
)
from onn.functional.surprise import (
    counterfactual_surprise as counterfactual_surprise,
)
from onn.functional.surprise import (
    expert_norms as expert_norms,
)
from onn.functional.surprise import (
    input_surprise as input_surprise,
)
from onn.functional.surprise import (
    matrix_surprise as matrix_surprise,
)
from onn.functional.surprise import (
    max_k_mask as max_k_mask,
)
from onn.functional.surprise import (
    min_k_indices as min_k_indices,
)
from onn.functional.surprise import (
    min_k_mask as min_k_mask,
)
from onn.functional.surprise import (
    neuron_surprise as neuron_surprise,
)
from onn.functional.surprise import (
    non_finite as non_finite,
)
from onn.functional.surprise import (
    normalised_surprise as normalised_surprise,
)
from onn.functional.surprise import (
    output_surprise as output_surprise,
)
from onn.functional.surprise import (
    parameter_surprise as parameter_surprise,
)
from onn.functional.surprise import (
    random_k_mask as random_k_mask,
)
from onn.functional.surprise import (
    select_min_k as select_min_k,
)
from onn.functional.surprise import (
    weight_surprise as weight_surprise,
)
from onn.functional.transform import SurpriseAndGrad as SurpriseAndGrad
from onn.functional.transform import surprise_and_grad as surprise_and_grad
from onn.functional.types import (
    Experts as Experts,
)
from onn.functional.types import (
    Local as Local,
)
from onn.functional.types import (
    Residuals as Residuals,
)
from onn.functional.types import (
    Router as Router,
)
from onn.functional.types import (
    Routing as Routing,
)
from onn.functional.types import (
    reduction_dtype as reduction_dtype,
)
