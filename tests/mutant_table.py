"""The mutants: small wrong changes, each with tests that must notice (see ``mutants.py``).

``text`` stands once in ``file``, with the part that is replaced in «»; without the marks all of it
is. In C++ that part is a whole statement, ending in a semicolon, or an expression. ``tests`` are
files of this folder, cheap ones first, thinned by ``keep`` (pytest's -k).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    text: str
    wrong: str
    tests: str
    keep: str

    @property
    def compiled(self) -> bool:
        """Whether it lies in C++, and is chosen at run time."""
        return not self.file.endswith(".py")

    @property
    def emulated(self) -> bool:
        """Whether it needs the CUDA kernels on the emulated device."""
        return "csrc/cuda/" in self.file

    def parts(self) -> tuple[str, str, str]:
        """What stands before the replaced text, the text, and what stands behind."""
        if "«" not in self.text:
            return "", self.text, ""
        before, rest = self.text.split("«")
        right, after = rest.split("»")
        return before, right, after

    def context(self) -> str:
        return "".join(self.parts())

    def arguments(self) -> list[str]:
        return [*(f"tests/{test}" for test in self.tests.split()), "-k", self.keep]


WIDE = [
    *(
        f"tests/test_{name}.py"
        for name in (
            *("golden", "masks", "contract", "losses", "standardize", "laws", "upstream"),
            *(
                "embedding_losses",
                "embedding_laws",
                "embedding_refilled",
                "composed",
                "triton_launch",
            ),
            *("errors", "gradcheck", "threads"),
        )
    )
]
"""The tests that have a try at what survives its own."""

MUTANTS: list[Mutant] = []


def _of(folder: str, file: str, tests: str, keep: str, *rows: tuple[str, ...]) -> None:
    """Rows (name, text, wrong) or, with tests of their own, (name, text, wrong, tests, keep)."""
    stem = PurePosixPath(file).stem
    for name, text, wrong, *own in rows:
        mine, thin = own or (tests, keep)
        path = f"{folder}/{file}"
        area = folder.rpartition("/")[2]
        MUTANTS.append(Mutant(f"{area}-{stem}-{name}", path, text, wrong, mine, thin))


# Rules of C++, on the CPU; the emulated CUDA kernels call the same.

_of(
    "csrc/rules", "math.h", "test_golden.py test_contract.py test_losses.py", "native",
    ("slope_sign", "const F gap = «q - p»;", "p - q"),
    ("series_too_far", "square < R(«0.0625»)", "4.0"),
    ("impossible_class", "select(p == R(0), gap, F(gap + p * d))", "F(gap + p * d)"),
    ("series_float", "sum = sum * d + R(«-1.6666642e-01»);", "-1.6766642e-01",
     "test_losses.py", "native and kd and close"),
    ("series_double", "sum = sum * d + R(«1.0 / 24.0»);", "1.0 / 25.0",
     "test_losses.py", "native and kd and close"),
    ("certain_label_double", "else tail = «std::log1p(e)»;", "std::log(1.0 + e)",
     "test_hard_weight.py", "native and certain_label"),
    ("infinite_target", "return «select(x == infinity, broadcast<F>("
     "std::numeric_limits<R>::quiet_NaN()), x)»;", "x",
     "test_contract.py", "native and infinite_target"),
    ("log_odds_swapped", "return «x > R(0)» ? TwoPoint<R>{rare", "x < R(0)"),
)  # fmt: skip
_of(
    "csrc/rules", "dkd.h", "test_golden.py test_losses.py", "native and dkd",
    ("alpha_in_slope", "slope = slope * alpha;", ""),
    ("beta_lost", "implicit_weight = broadcast<F>(«beta»);", "R(1)"),
)  # fmt: skip
_of(
    "csrc/rules", "aekt.h", "test_losses.py", "native and aekt and samples",
    ("kappa_zero", "kappa == R(0) ? broadcast<F>(R(1)) : exponential(F(bounded * kappa))",
     "exponential(F(bounded * kappa))"),
    ("nothing_over_nothing", "select(p.log_t == none, none, F(p.log_t - q.log_t))",
     "F(p.log_t - q.log_t)"),
    ("ratio_unbounded", "smaller(log_ratio, broadcast<F>(std::log(ratio_max)))", "log_ratio"),
    ("slope_unweighted", "slope = slope * weight * alpha;", "slope = slope * alpha;"),
)  # fmt: skip
_of(
    "csrc/rules", "mixture.h", "test_golden.py test_language_models.py", "native or equals",
    ("excess_lost", "F(«log * b - delta * excess»)", "log * b"),
    ("near_slope", "F(«slope - under * b»)", "slope"),
    ("weights_of_the_slope",
     "-R(«given[2] * given[1] * given[1] + given[3] * given[0] * given[0]»)",
     "given[2] * given[1] * given[0] + given[3] * given[0] * given[1]"),
    ("share_of_the_larger", "select(teacher_larger, «broadcast<F>(of_q)», broadcast<F>(of_p));",
     "broadcast<F>(of_p)"),
    ("from_the_larger", "const F below = select(teacher_larger, «F(-d)», d);", "d"),
    ("impossible_class",
     "slope = «select(q == R(0), F{}, F(q * of_q * select(teacher_larger, F(log + below), log)))»;",
     "F(q * of_q * select(teacher_larger, F(log + below), log))",
     "test_language_models.py", "finite"),
)  # fmt: skip
_of(
    "csrc/rules", "mixed_kl.h", "test_golden.py", "native",
    ("reverse_slope_sign", "F(«-(q * d)» * reverse)", "q * d"),
    ("forward_slope_lost", "slope = gap * «forward»;", "R(1)"),
    ("weights_swapped", "R(options.value[0]), reverse = R(«1.0 - options.value[0]»)",
     "options.value[0]"),
)  # fmt: skip
_of(
    "csrc/cpu", "row_stages.cpp", "test_language_models.py", "native and digits",
    ("certain_rows", "rules::select(certain, «rules::logarithm_of_one_plus(gap)», log_ratio)",
     "log_ratio"),
)  # fmt: skip
_of(
    "csrc/cpu", "evaluate.cpp", "test_corners.py", "native and columns",
    ("one_long_sum", "if (count > «256») return total(values", "int64_t(1) << 60"),
)  # fmt: skip
_of(
    "csrc/rules", "tv.h", "test_golden.py", "native",
    ("sign", "select(less, F(q * R(«-0.5»))", "0.5"),
    ("half", "F(-gap), gap) * R(«0.5»)", "1.0"),
    ("equal_not_seen", "const F equal = «q * (R(16) * std::numeric_limits<R>::epsilon())»;",
     "F{}"),
    ("overlap_of_the_larger", "value = select(«p < q», p, q);", "q < p",
     "test_language_models.py", "native and acceptance"),
)  # fmt: skip
_of(
    "csrc/rules", "dist.h", "test_golden.py test_contract.py test_losses.py", "native and dist",
    ("norm_zero", "of_q = «lost | (norm_a == R(0)) ? R(0) : on_a»;", "on_a"),
    ("eps_lost", "norm_a * norm_b + eps", "norm_a * norm_b"),
    ("own_term", "of_p = lost ? R(0) : «-inverse»;", "inverse"),
)  # fmt: skip
_of(
    "csrc/rules", "sigmoid_kd.h", "test_sigmoid.py", "native and kd",
    ("side", "slope = «select(likely, F(-difference), difference)»;", "difference"),
    ("near_by_the_logarithms", "g * g < R(«4»)", "0"),
    ("other_outcome", "F(p * of_p + «others * under»)", "under"),
    ("certain_of_infinity", "«select(rare == R(0), F{}, F(rare * y))»;", "F(rare * y)"),
    ("impossible", "«select(p == R(0), F{}, F(p * g))»;", "F(p * g)"),
    ("nan", "value = «select(z == z, value, z)»;", "value"),
)  # fmt: skip
_of(
    "csrc/rules", "iekd.h", "test_embedding_losses.py test_embedding_laws.py", "native",
    ("cosine_half", "term = «R(0.5)» * d * d;", "R(1)"),
    ("tie_direction", "select(d > F{}, one, F{}) - select(d < F{}, one, F{})",
     "F(one - select(d < F{}, F(one + one), F{}))",
     "test_embedding_laws.py", "native and equal_factors"),
    ("short_vector", "unit ? sum : R(1) - projection", "sum",
     "test_embedding_laws.py", "native and short_factors"),
    ("exploration_sign", "sign = inherits ? R(1) : R(«-1»);", "1"),
)  # fmt: skip

# Traversals of the CPU.

_of(
    "csrc/cpu", "modes.h", "test_standardize.py", "native and contiguous",
    ("rest_of_moments", "return rules::select(lane_numbers<R>(0) < typename Simd<R>::Int("
     "mode.rest()), v,\n                       typename M::V{});", "return v;"),
)  # fmt: skip
_of(
    "csrc/cpu", "sources.h", "test_losses.py", "native and kd and (gap or huge or offset)",
    ("maximum_without_rest", "s1 = maximum(s1, fetch(s, whole, Part<true>{}));", ""),
)  # fmt: skip
_of(
    "csrc/cpu", "row_stages.cpp", "test_standardize.py", "native",
    ("only_the_target", "row.max_s = rules::select(row.max_s == -kInfinity<R>, S{}, row.max_s);",
     "", "test_losses.py", "native and (dkd or aekt) and (mask_all or 3x1 or 1x1)"),
    ("spread_eps", "row.spread_s = row.moments_s.deviation + «R(rules::kStandardizeEps)»;", "R(0)"),
    ("centre_from_zero", "Moments<S> row{«mode.first(x)», S{}, S{}};", "S{}",
     "test_standardize.py", "native and many_lengths"),
    ("no_rest_of_mean", "row.rest = M::sum(sum.total) * inverse;", ""),
    ("biased_deviation", "square * R(1.0 / double(«mode.classes - 1»))", "mode.classes"),
    ("constant_row", "pull = rules::select(deviation == R(0), S{}, pull);", ""),
    ("mean_slope", "out -= factor * ((mode.template get<kPart>(row.s, i, R(0)) - centre) - rest);",
     ""),
    ("teacher_keeps_target", "mode.exclude(i, b, fill);", "",
     "test_losses.py", "native and dkd and gaussian"),
    ("gap_by_one_scale", "b * factor_t - a * factor_s", "(b - a) * factor_t"),
)  # fmt: skip
_of(
    "csrc/cpu", "row_kernel.h", "test_losses.py", "native and (kd or dkd) and float32-float32",
    ("no_other_class_s", "inverse_s = rules::select(row.z_s == R(0), S{}, inverse_s);", "",
     "test_losses.py", "native and (mask_rest or mask_all)"),
    ("no_other_class_t", "implicit_weight = rules::select(row.z_t == R(0), S{}, implicit_weight);",
     "", "test_losses.py", "native and mask_rest"),
    ("infinite_term", "implicit_slope = rules::select(row.z_s == R(0), S{}, implicit_weight);",
     "implicit_slope = implicit_weight;", "test_losses.py", "native and mask_rest"),
    ("gradient_scale", "const S g = row.coefficient * «row.scale_s»;", "row.scale_t",
     "test_standardize.py", "native"),
    ("explicit_spread", "out -= g_explicit * q;", "",
     "test_losses.py", "native and dkd and gaussian"),
    ("target_by_row", "mode.set_excluded(i, out, g_explicit);", "",
     "test_losses.py", "native and dkd and (transposed or image)"),
    ("log_ratio", "«load<R>(from_gap + i * kLanes<R>) - log_z_ratio»;",
     "load<R>(from_gap + i * kLanes<R>) + log_z_ratio"),
)  # fmt: skip
_of(
    "csrc/cpu", "row_lanes.h", "test_masks.py", "native",
    ("mask_of_gradient",
     "store<R>(sink.to + c * kW, «rules::select(ignored, Vec<R>{}, out)»);", "out"),
    ("mask_of_value",
     "value = «rules::select(ignored, Vec<R>{}, rules::weighted(value, weight))»;",
     "rules::weighted(value, weight)"),
    ("token_weight_of_value", "weight[lane] = «factors.value»;",
     "R(problem.scale)", "test_row_keywords.py", "native and token_weight"),
    ("mask_of_hard", "hard = «rules::select(ignored, hard, rules::weighted(state.hard_value, "
     "hard_weight))»;", "rules::weighted(state.hard_value, hard_weight)",
     "test_hard_weight.py", "native and traversal"),
    ("last_vector", "int(«end - row < kW ? end - row : kW»)", "kW"),
    ("gradient_of_unread_rows",
     "if (problem.gradient.data) «std::memset(sink.to, 0, sizeof(R) * kW * classes);»", ""),
)  # fmt: skip
_of(
    "csrc/cpu", "row_scratch.h", "test_losses.py", "native and kd and gaussian",
    ("upstream_of_first_row", "upstream(of_row<R>(problem.upstream, «row», R(1)))", "0"),
    ("scale_of_value", "value(«R(problem.scale)» *", "R(1)"),
    ("gradient_over_logits",
     "return problem.standardize || !rules::PointwiseOf<Rule>::type::centred;",
     "return !rules::PointwiseOf<Rule>::type::centred;", "test_standardize.py", "native"),
    ("token_weight_of_first_row", "of_row<R>(problem.token_weight, «row», R(1))", "0",
     "test_row_keywords.py", "native and token_weight"),
    ("hard_weight_of_first_row", "of_row<R>(problem.hard_token_weight, «row», R(1))", "0",
     "test_hard_weight.py", "native and adds"),
    ("temperature_of_first_row", "of_row<R>(problem.row_temperature, «row», R(1))", "0",
     "test_temperatures.py", "native and each_row"),
    ("parts_swapped", "parts[problem.rows + row] = «hard»;", "value",
     "test_hard_weight.py", "native and parts"),
)  # fmt: skip
_of(
    "csrc/cpu", "row_loss.h", "test_masks.py", "native",
    ("dealt_rows_are_skipped", "__atomic_fetch_add(&c.next, «c.share», __ATOMIC_RELAXED)",
     "c.share + 1", "test_threads.py", "native and dealt"),
    ("last_rows_are_not_dealt",
     "const int64_t last = «first + c.share < c.units ? first + c.share : c.units»;",
     "first + c.share < c.units ? first + c.share : first", "test_threads.py", "native and dealt"),
    ("mask_of_gradient_by_class", "std::memset(to.to, 0, sizeof(G) * classes);", ""),
    ("mask_of_value_by_class", "put_values<R>(problem, row, R(«0»), R(0), R(0));", "1"),
    ("upstream_of_hard", "state.hard_coefficient = «factors.hard * factors.upstream»;",
     "factors.hard", "test_hard_weight.py", "native and adds"),
)  # fmt: skip
_of(
    "csrc/cpu", "convert.h", "test_losses.py", "native and kd and bfloat16",
    ("bfloat16_truncated", "VecU rounded = «(bits + 0x7fff + ((bits >> 16) & 1)) >> 16»;",
     "bits >> 16"),
    ("rows_not_adjacent", "if («count == kW && x.adjacent(row, kW)») {\n      auto* from",
     "count == kW", "test_losses.py test_masks.py", "native and (layout or cropped)"),
    ("vectors_not_adjacent", "if («count % kW == 0 && x.adjacent(row, count)»)", "count % kW == 0",
     "test_masks.py", "native and images"),
    ("unread_vectors", "if («wanted[g]») read_run(from + g * kW", "g == 0",
     "test_masks.py", "native and images"),
)  # fmt: skip
_of(
    "csrc/cpu", "simd.h", "test_losses.py", "native and kd and (gaussian or gap)",
    ("exponential", "y = y * r + «2.40226498e-01f»;", "2.40326498e-01f"),
    ("underflow", "lowest(R(«kLowestPower») / scale)", "-200.0f"),
)  # fmt: skip
_of(
    "csrc/cpu", "evaluate.cpp", "test_masks.py test_golden.py", "native",
    ("mean_over_ignored", "«--valid»;", "valid"),
    ("sum_without_tail", "sums[0] += double(values[i]);", "",
     "test_losses.py", "native and gaussian"),
    ("target_range", "target >= problem.classes", "target > problem.classes",
     "test_errors.py", "native"),
    ("columns_by_rows", "problem.intra /= double(«problem.classes»);", "problem.rows",
     "test_golden.py test_losses.py", "native and dist"),
    ("mean_of_all_rows", "problem.inter /= double(«counted»);", "problem.rows",
     "test_dist_ignored.py", "native and equals"),
    ("columns_of_nothing", "if («!counted») problem.intra = 0.0;", "false",
     "test_dist_ignored.py", "native and equals"),
)  # fmt: skip
_of(
    "csrc/cpu", "correlation_row.h", "test_losses.py", "native and dist",
    ("rest_of_row", "a = mask_rest(mode, a);", ""),
    ("rest_of_gradient", "if constexpr (kPart) «g = mask_rest(mode, g);»", ""),
    ("softmax_derivative", "load<R>(pull + at) - centre", "load<R>(pull + at)"),
    ("sigmoid_derivative", "x * «(R(1) - x)» * factor * g", "x",
     "test_sigmoid.py", "native and dist"),
    ("row_weight", "return value * «inter»;", "R(1)"),
)  # fmt: skip
_of(
    "csrc/cpu", "correlation_columns.h", "test_losses.py", "native and dist",
    ("merge_without_means", "a[kQP] += b[kQP] + dq * dp * weight;", "a[kQP] += b[kQP];"),
    ("column_weight", "to[kOfP * c.stride] = of_p * «R(problem.intra)»;", "R(1)"),
    ("ignored_chunk_counts", "merge(total, m, double(before), «double(c.counts[chunk])»);",
     "double(c.chunk_rows)", "test_dist_ignored.py", "native and equals"),
)  # fmt: skip
_of(
    "csrc/cpu", "correlation_lanes.h", "test_dist_ignored.py", "native and equals",
    ("columns_of_the_ignored",
     "f(j, «rules::select(tile.masks[g], V(load<R>(q + g * apart) - less_q), V{})»,",
     "V(load<R>(q + g * apart) - less_q)"),
    ("origin_of_the_ignored", "if (!counted) «first = i;»", ""),
    ("rows_that_count", "R(1.0 / double(«tile.counted»))", "tile.count"),
    ("gradient_of_the_ignored", "«rules::select(masks[g], load<R>(to + i), Vec<R>{})»);",
     "load<R>(to + i)"),
    ("gradient_of_the_unread", "if (!counts[g]) «std::memset(to, 0, sizeof(R) * size);»", ";"),
    ("value_of_the_ignored",
     "«rules::select(tile.masks[g], relate_row<Rule>(mode, problem, q, p, q, p, terms), value)»;",
     "relate_row<Rule>(mode, problem, q, p, q, p, terms)"),
    ("sum_of_lanes", "x[i] += «x[i + half]»;", "x[i]"),
)  # fmt: skip
_of(
    "csrc/cpu", "correlation.h", "test_dist_ignored.py", "native and equals",
    ("columns_of_the_ignored",
     "merge_tile<R>(students, tiles.second, c.stride, problem.classes, «counted»,", "count"),
    ("gradient_of_the_ignored", "for (int64_t i = 0; i < problem.classes; ++i) «q[i] = R(0);»", ""),
)  # fmt: skip
_of(
    "csrc/cpu", "tiles.h", "test_dist_ignored.py test_sigmoid.py", "native and (equals or dist)",
    ("first_of_a_group", "if («first == span») return;", "first"),
    ("rows_of_a_span", "transpose<R>(lanes, «span», span, tile", "kLanes<R>"),
)  # fmt: skip
_of(
    "csrc/cpu", "probabilities.h", "test_sigmoid.py", "native and dist",
    ("mean_of_a_row", "M::first_of(first_q) + M::sum(sum_q.total) * «share»;", "R(0)"),
    ("rest_of_a_row", "a = mask_rest(mode, a);", ""),
)  # fmt: skip
_of(
    "csrc/cpu", "binary.h", "test_sigmoid.py", "native and kd",
    ("temperature_of_the_slope", "M::spread(«S(row.coefficient * row.inverse_temperature)»)",
     "S(row.coefficient)"),
)  # fmt: skip
_of(
    "csrc/cpu", "embedding_factor.h", "test_embedding_losses.py test_embedding_laws.py", "native",
    ("both_must_be_unit", "norm_a.unit && norm_t.unit", "norm_a.unit"),
    ("small_norm_projected", "n.unit ? factor * projection : R(0)", "factor * projection"),
    ("squares_out_of_range", "!(sum > 1e-30 && sum < 1e30)", "false"),
    ("squares_out_of_double", "std::is_same_v<R, double> && «sum > 1e300»", "false"),
)  # fmt: skip
_of(
    "csrc/cpu", "embedding_tuple.h",
    "test_embedding_refilled.py test_embedding_losses.py", "native",
    ("margin", "(d <= margin)", "(d < margin)"),
    ("gap_of_zero", "(d > Vec<R>{})", "(d >= Vec<R>{})"),
    ("positive_in_gradient", "anchor.gradient[p] += slope;", ""),
    ("anchor_as_positive", "if («p == row || anchor.other[p]») continue;", "anchor.other[p]"),
    ("underflow", "largest * inverse > R(std::is_same_v<R, float> ? 60 : 600)", "false"),
)  # fmt: skip
_of(
    "csrc", "bridge.h", "test_losses.py", "native and layouts",
    ("merged_dimensions", "last >= 0 && «rows.stride[last] == strides[dim] * sizes[dim]»",
     "rows.stride[last] >= strides[dim] * sizes[dim]"),
)  # fmt: skip

# CUDA kernels, on the emulated device.

_of(
    "csrc/cuda", "row.cuh", "test_cuda_kernels.py", "row_traversals and float32",
    ("mean_over_ignored", "weight_ /= R(«valid[0] > 0 ? valid[0] : 1»);", "task.problem.rows"),
    ("counted_ignored", "valid[0] += «task.problem.target[row] != task.problem.ignore_index»;",
     "true"),
    ("ignored_rows", "row.valid = «row.target != problem.ignore_index»;", "true"),
    ("no_other_class", "inverse_s = «z[0] == R(0) ? R(0) : inverse_s»;", "inverse_s",
     "test_losses.py", "emulated and (mask_rest or mask_all)"),
    ("infinite_term", "kDecoupled && z[0] == R(0) ? R(0) : g * implicit_weight",
     "g * implicit_weight", "test_losses.py", "emulated and mask_rest"),
    ("unrounded_origin", "z[i] *= unrounded(multiply_add(origin[i], factor[i], -at[i]));", "",
     "test_cuda_kernels.py", "finite_masks or long_rows"),
    ("restart", "if (z[0] <= R(4096) && z[1] <= R(4096)) break;", "break;",
     "test_cuda_kernels.py", "finite_masks or long_rows"),
    ("rest_of_mean", "of_s.rest = sums[0] / classes;", "of_s.rest = R(0);",
     "test_standardize.py", "emulated"),
    ("target_gradient", "source.put(row.target, «g_explicit - pulled»);", "g_explicit",
     "test_standardize.py", "emulated"),
)  # fmt: skip
_of(
    "csrc/cuda", "resident.cuh", "test_cuda_kernels.py", "row_traversals and float32",
    ("part_of_another", "if (at >= 0 && at < read_ && «at / kPack<T> % size_ == rank_») {",
     "at % size_ == rank_"),
    ("edges_without_maximum", "origin[0] = larger(origin[0], widen(edge_s_));", "",
     "test_cuda_clusters.py", "logits_around"),
    ("excluded_edge", "} else if («edge_ == target») {", "false",
     "test_cuda_clusters.py", "anywhere and float32"),
    ("ignored_edge", "if (begin == 0 && row.edge(rank_) >= 0) at_.g[row.edge(rank_)] = "
     "narrow<T>(0.0f);", "", "test_cuda_clusters.py", "anywhere and float32"),
)  # fmt: skip
_of(
    "csrc/cuda", "streamed.cuh", "test_cuda_kernels.py", "row_traversals and float32",
    ("excluded_pack", "if (i == excluded_) pack.exclude(which_);", ""),
)  # fmt: skip
_of(
    "csrc/cuda", "correlation_walk.cuh", "test_cuda_kernels.py test_cuda_slices.py", "slices",
    ("parts_without_means", "products[2] * factor[0] * factor[1] + gap[0] * gap[1] * one",
     "products[2] * factor[0] * factor[1]"),
)  # fmt: skip
_of(
    "csrc/cuda", "row_cluster.cu", "test_cuda_clusters.py", "next_row and float32",
    ("fence_of_slices", "«fence_bulk();»\n    sync_block();", ""),
    ("wait_of_slices", "barrier_wait(barriers_ + begin / part_, parity_);", ""),
    ("parts_beyond_the_slice", "most = «slice_ - begin < part_ ? slice_ - begin : part_»;",
     "part_"),
)  # fmt: skip
_of(
    "csrc/cuda", "correlation_columns.cu", "test_cuda_kernels.py", "correlation and columns",
    ("fence_of_tiles", "phases ^= 1u << stage;\n        «fence_bulk();»", ""),
)  # fmt: skip
_of(
    "csrc/cuda", "correlation_walk.cuh", "test_cuda_slices.py", "slices",
    ("fence_of_rows", "if (bulk) «fence_bulk();»", ""),
    ("wait_of_the_block", "if (cluster > 1) «barrier_wait_cluster(barriers + i % kHandings, "
     "unsigned(i / kHandings) % 2);»",
     "barrier_wait(barriers + i % kHandings, unsigned(i / kHandings) % 2);"),
)  # fmt: skip
_of(
    "csrc/cuda", "tuple_pairs.cu", "test_cuda_embedding.py", "tuples or margin",
    ("margin", "gap = student - anchor.at[p];\n    if (!(gap > R(0) && «gap <= k.margin»))",
     "gap < k.margin"),
)  # fmt: skip

# Rules and traversals of Triton, interpreted.

_of(
    "kdkernels/triton", "kd.py", "test_golden.py test_contract.py test_losses.py", "triton and kd",
    ("series_too_far", "near = tl.abs(d) < «0.25»", "2.5"),
    ("impossible_class", "return «tl.where(p == 0, q, value), tl.where(p == 0, q, slope)»",
     "value, slope"),
    ("slope_sign", "tl.where(near, p * (series - d), «q - p»)", "p - q"),
)  # fmt: skip
_of(
    "kdkernels/triton", "aekt.py", "test_losses.py", "triton and aekt and samples",
    ("kappa_zero", "weight = «tl.where(kappa == 0, 1.0, tl.exp(log_ratio * kappa))»",
     "tl.exp(log_ratio * kappa)"),
    ("nothing_over_nothing", "tl.where(log_p_target == none, none, log_p_target - log_q_target)",
     "log_p_target - log_q_target"),
)  # fmt: skip
_of(
    "kdkernels/triton", "mixture.py", "test_golden.py", "triton",
    ("excess_lost", "far = b * log «- of_q * (a * of_q - b * of_p) * delta»", ""),
    ("near_slope", "near = «-b * under» - (a", "0.0"),
    ("terms_of_the_student", "value = m * (a * of_teacher «+ b * of_student»)", ""),
)  # fmt: skip
_of(
    "kdkernels/triton", "mixed_kl.py", "test_golden.py", "triton",
    ("reverse_slope_sign", "tl.where(q == 0, 0.0, «-(q * d)» * reverse)", "(q * d)"),
)  # fmt: skip
_of(
    "kdkernels/triton", "blocks.py", "test_language_models.py", "triton and digits",
    ("certain_rows", "return tl.where(certain, «near», tl.log(teacher_sum / student_sum))",
     "tl.log(teacher_sum / student_sum)"),
)  # fmt: skip
_of(
    "kdkernels/triton", "tv.py", "test_golden.py", "triton",
    ("sign", "tl.where(gap < -equal, «-0.5» * q, gap * 0.0)", "0.5"),
    ("overlap_of_the_larger", "tl.«minimum»(p, q)", "maximum",
     "test_language_models.py", "triton and acceptance"),
)  # fmt: skip
_of(
    "kdkernels/triton", "dist.py",
    "test_golden.py test_corners.py test_contract.py test_losses.py", "triton and dist",
    ("eps_lost", "total = product «+ eps»", ""),
    ("lost_kept", "tl.where(«lost | (norm_a == 0), 0.0, on_a»)", "norm_a < 0, 0.0, on_a"),
)  # fmt: skip
_of(
    "kdkernels/triton", "sigmoid_kd.py", "test_sigmoid.py", "triton and kd",
    ("side", "tl.where(likely, «-difference», difference)", "difference"),
    ("other_outcome", "«others * excess(-log, z)»", "excess(-log, z)"),
    ("certain_of_infinity", "tl.where(rare == 0, 0.0, rare * y)", "rare * y"),
)  # fmt: skip
_of(
    "kdkernels/triton", "binary_kernel.py", "test_masks.py", "triton and sigmoid_kd",
    ("mask_of_gradient", "gradient = tl.where(valid, «slope * factor», 0.0)", "slope"),
    ("ignored_rows_read", "valid = exists & (index != ignore_index)", "valid = exists"),
)  # fmt: skip
_of(
    "kdkernels/losses", "sigmoid_kd.py", "test_row_keywords.py", "unknown",
    ("keywords_of_a_softmax", "if «name not in KEYWORDS»:", "False"),
)  # fmt: skip
_of(
    "kdkernels/triton", "numerics.py", "test_contract.py", "triton and digits",
    ("softplus", "tl.where(exact, x, tl.log(rounded) * (x / tl.where(exact, 1.0, gap)))",
     "tl.log(rounded)"),
)  # fmt: skip
_of(
    "kdkernels/triton", "row_kernel.py", "test_masks.py", "triton",
    ("mask_of_gradient", "gradient = «tl.where(valid, gradient, 0.0)»", "gradient"),
    ("mean_over_ignored", "count = «tl.maximum(tl.load(count_ptr), 1)».to(ACC)", "rows"),
    ("hard_weight_of_all", "hard_weight = «hard_weight * its_weight»", "hard_weight",
     "test_hard_weight.py", "triton and adds"),
    ("hard_upstream", "hard_factor = hard_factor * hard_weight «* upstream»", "",
     "test_hard_weight.py", "triton and adds"),
    ("temperature_of_all", "student_k = «1.0 / tl.load(temperature_ptr + row, mask=exists, "
     "other=1.0).to(ACC)»", "tl.full([], inverse_temperature, ACC)",
     "test_temperatures.py", "triton and each_row"),
    ("ignored_rows_read", "valid = exists & (index != ignore_index)", "valid = exists"),
    ("base_lost", "student - student_base, inside, count", "student, inside, count",
     "test_standardize.py", "triton"),
    ("constant_row", "constant = student_std == 0", "constant = student_std < 0",
     "test_standardize.py", "triton"),
    ("target_apart", "gradient = «tl.where(columns == target, explicit_slope, gradient)»",
     "gradient", "test_losses.py", "triton and dkd and families"),
)  # fmt: skip
_of(
    "kdkernels/triton", "blocks.py", "test_triton_launch.py", "not compile",
    ("merge_without_means", "squares + block_squares «+ delta * delta * (before * share)»", ""),
    ("origin_moved", "total = total «* tl.exp((maximum - shift) * k)»", ""),
)  # fmt: skip
_of(
    "kdkernels/triton", "column_kernels.py", "test_triton_launch.py test_losses.py", "dist",
    ("merge_without_means", "chunk_qp «+ q * p * count»", ""),
    ("columns_of_nothing", "weight = «tl.where(total > 0, weight, 0.0)»", "weight",
     "test_dist_ignored.py", "triton and equals"),
    ("tile_of_the_ignored", "number = tl.sum(«exists».to(tl.int64))", "(row < stop)",
     "test_dist_ignored.py", "triton and equals"),
)  # fmt: skip
_of(
    "kdkernels/triton", "cross_kernels.py", "test_losses.py", "triton and dist",
    ("softmax_derivative", "else q * (g «- along»)", ""),
    ("sigmoid_derivative", "q * «(1.0 - q)» * g", "1.0", "test_sigmoid.py", "triton and dist"),
    ("loss_of_the_ignored", "«tl.where(counts, value * weight, 0.0)»", "value * weight",
     "test_dist_ignored.py", "triton and equals"),
)  # fmt: skip
_of(
    "kdkernels/triton", "layout.py", "test_losses.py", "triton and layouts",
    ("merged_dimensions", "levels and «levels[-1][1] == tuple(s * size for s in step)»",
     "levels[-1][1] >= tuple(s * size for s in step)"),
)  # fmt: skip
_of(
    "kdkernels/triton", "scale.py", "test_upstream.py", "triton",
    ("factor_below_one", "if upstream «!=» 1.0:", ">"),
)  # fmt: skip
_of(
    "kdkernels/triton", "embedding_tuples.py", "test_embedding_refilled.py", "triton",
    ("margin", "(gap «<=» margin)", "<"),
    ("gap_of_zero", "(gap «>» 0)", ">="),
)  # fmt: skip
_of(
    "kdkernels/triton", "embedding_factors.py",
    "test_embedding_losses.py test_embedding_laws.py", "triton",
    ("small_norm_projected", "tl.where(a_unit, a_outer * a_along, 0.0)", "a_outer * a_along"),
)  # fmt: skip

# Python: masks and reductions, losses, the composed gradients.

_of(
    "kdkernels", "_reduce.py", "test_masks.py test_golden.py", "reference",
    ("mean_over_ignored", "count = «valid.sum().clamp(min=1)» if", "values.shape[0]"),
    ("ignored_rows_read",
     "student = «torch.where(valid.unsqueeze(-1), student, torch.zeros_like(student))»", "student"),
    ("sum_as_mean", "if call.reduction == «1»:", "2"),
)  # fmt: skip
_of(
    "kdkernels", "_rowwise.py", "test_golden.py test_laws.py", "kd and (native or reference)",
    ("temperature_once", "scale = scale * temperature «* temperature»", ""),
)  # fmt: skip
_of(
    "kdkernels/losses", "_centers.py", "test_embedding_refilled.py", "centers",
    ("sums_in_float32", "dtype=«torch.float64», device=device", "torch.float32"),
    ("batch_in_float32", "embeddings.shape[1], dtype=«torch.float64»)", "torch.float32"),
)  # fmt: skip
_of(
    "kdkernels/reference", "_rows.py", "test_standardize.py", "reference",
    ("base_lost", "logits = logits «- logits[..., :1].detach()»", ""),
    ("common_error", "return probs «/ torch.where(total == 0, 1.0, total)»", "",
     "test_corners.py", "many_classes"),
    ("error_of_the_normalisers", "moderate = d.abs() < 0.25, «(d.abs() < 20) & (p != 0)»",
     "d != d", "test_corners.py", "many_classes"),
)  # fmt: skip
_of(
    "kdkernels/reference", "refilled.py", "test_embedding_refilled.py", "margin",
    ("margin", "(gap «<=» margin)", "<"),
)  # fmt: skip
_of(
    "kdkernels/composed", "pkd.py", "test_standardize.py test_composed.py", "channels or pkd",
    ("biased_slope", "value=-1 / «(count - 1)»", "count"),
    ("first_value", "torch.sub(ours, «ours[:, :1, :1, :1]», out=s.view(ours.shape))",
     "0 * ours[:, :1, :1, :1]"),
)  # fmt: skip
_of(
    "kdkernels/composed", "attention.py", "test_composed.py test_embedding_losses.py", "attention",
    ("normalisation_derivative", "(slope «- q * along»)", ""),
    ("sign_of_power", "out.pow_(p - 1)«.mul_(student[block].sgn())».mul_", ""),
)  # fmt: skip

# Python: autograd, the operators, the choice of a backend, sharded tensors.

_of(
    "kdkernels", "_autograd.py", "test_saved_tensors.py", "kd",
    ("target_unsaved", "save(ctx, «(student, *constants)»)",
     "(student, *(x.data if x is not None else x for x in constants))"),
    ("inference_saved", "if tensor is not None and «tensor.is_inference()»:", "False"),
)  # fmt: skip
_of(
    "kdkernels", "_autograd.py", "test_transforms.py", "batched and (kd or iekd)",
    ("batched_unscaled", "    return («gradient * upstream»).to(student.dtype)", "gradient"),
    ("batched_several", "gradients = [(«g * upstream»).to(g.dtype) for g in gradients]", "g * 1"),
)  # fmt: skip
_of(
    "kdkernels", "_autograd.py", "test_upstream.py", "kd and (native or reference)",
    ("stored_none", "return «reduction != 0 and» student.dtype", ""),
    ("stored_unscaled", "gradient = «kernels.scale_(gradient, upstream)»", "gradient"),
)  # fmt: skip
_of(
    "kdkernels", "_ops.py", "test_compile.py", "fullgraph and kd and native",
    ("operator_unscaled", "made = [(«g * factor»).to(g.dtype)", "g * 1"),
)  # fmt: skip
_of(
    "kdkernels", "_ops.py", "test_compile.py", "refuse and kd and native",
    ("tangents_dropped", "if «forward_ad._current_level >= 0»:", "False"),
)  # fmt: skip
_of(
    "kdkernels", "_ops.py", "test_transforms.py", "double and kd",
    ("twice_silent",
     "    backward = staticmethod(«no_double_backward»)\n\n    @staticmethod\n    def jvp",
     "lambda ctx, g: (torch.zeros_like(g), None, None)"),
)  # fmt: skip
_of(
    "kdkernels", "_dispatch.py", "test_transforms.py", "forward_mode and kd",
    ("transforms_unseen", "if «_tracing.transformed()»:", "False"),
)  # fmt: skip
_of(
    "kdkernels", "_tracing.py", "test_recorders.py test_compile.py", "kd and native",
    ("recorders_unseen", "        or «torch._C._get_tracing_state() is not None»\n    ):", "False"),
)  # fmt: skip
_of(
    "kdkernels", "_tracing.py", "test_schedules.py", "kd-native",
    ("symbols_unseen",
     "    if «all([known(x < pivot) or known(x >= pivot) for x in numbers for pivot in _PIVOTS])»:",
     "True"),
)  # fmt: skip
_of(
    "kdkernels", "_dtensor.py", "test_dtensor.py", "sharded",
    ("count_of_shard", "count = «valid.full_tensor()».clamp(min=1)", "valid.to_local()"),
    ("row_dim", "Shard(p.dim «- (p.dim > class_dim)» + before)", ""),
    ("silent_rows_count", "own = (y != «index»).sum()", "call.ignore_index"),
    ("parts_are_sums", "torch.cat([parts[:2] «/ count», parts[2:]])", ""),
    ("classes_gathered", "over = «_classes_over(given, call.class_dim) if of_shards else None»",
     "None"),
)  # fmt: skip
_of(
    "kdkernels", "_group.py", "test_group.py", "every",
    ("gradient_of_one", "return upstream «* ctx.ranks», None", ""),
    ("rows_of_the_first", "begin = «sum(counts[: group.rank()])»", "0"),
    ("others_move", "rows[:rank], «own[None]», rows[rank + 1 :]", "own.detach()[None]"),
    ("second_derivative", "if «torch.is_grad_enabled()»:  # create_graph", "False"),
)  # fmt: skip
_of(
    "kdkernels", "_group.py", "test_group_alone.py", "before",
    ("transforms_unseen", "    if «transformed()»:", "False"),
)  # fmt: skip
_of(
    "kdkernels", "_group.py", "test_sharded_classes.py", "every",
    ("slopes_stay", "return «total(upstream.clone(), ctx.group)»[ctx.group.rank()], None",
     "upstream"),
)  # fmt: skip
_of(
    "kdkernels", "_shard_rows.py", "test_sharded_classes.py", "every",
    ("buckets_twice", "whole «- coarse»)", ""),
    ("rank_unweighted", "weighted(inner, «masses»)", "torch.ones_like(masses)"),
    ("foreign_ids_absent", "columns = torch.where(local == NO_ID, «0.0», wide[:, :k])",
     "-torch.inf"),
    ("overlap_of_the_ignored", "x = «x.masked_fill(~self.valid.unsqueeze(-1), 0.0)»", "x"),
    ("least_rate", "«torch.finfo(self.dtype).tiny» * LEAST", "1e-5"),
)  # fmt: skip
_of(
    "kdkernels", "_shards.py", "test_sharded_classes.py", "every",
    ("class_of_rank", "local = ids «- self.begin»", ""),
    ("options_unlike", "code = «zlib.crc32(repr(said).encode())»", "0"),
)  # fmt: skip
_of(
    "kdkernels", "_sharded.py", "test_sharded_classes.py", "every",
    ("teacher_hard", "hard=«0.0», parts=False,\n        )", "call.hard"),
)  # fmt: skip
_of(
    "kdkernels/linear", "_sharded.py", "test_sharded_head.py", "output",
    ("hidden_of_rank", "whole = «_group.total(whole.contiguous(), how.shards.group)»", "whole"),
    ("chunks_of_rank", "default_tokens(hidden.device, «max(shards.sizes)», *dtypes)",
     "weight.shape[0]"),
)  # fmt: skip
_of(
    "kdkernels/linear", "_sharded_logprob.py", "test_sharded_head.py", "output",
    ("rests_whole", "slopes[:, -1:] «* share»], -1)", ""),
    ("spread_within", "torch.special.entr(masses).sum(-1) «+ within»)", ""),
)  # fmt: skip
_of(
    "kdkernels", "_moments.py", "test_group.py", "every",
    ("means_alike", "whole = squares.sum(0) «+ (weights * between).sum(0)»", ""),
    ("ignored_in_columns", "if counted is not None:\n        «x *= counted\n    mean»",
     "pass\n    mean"),
    ("mean_unweighted", "(weights * apart).sum(0) / «total.clamp(min=1)»", "len(counts)"),
    ("means_still", "torch.addcmul(«mean / count», s, 2 * square)", "0 * mean"),
)  # fmt: skip
_of(
    "kdkernels", "_rowwise.py", "test_group.py", "every",
    ("count_of_rank", "count = «_group.total(own, group)».clamp(min=1)", "own"),
    ("share_of_one", "return sums * (group.size() / count.to(sums.dtype))",
     "return sums / count.to(sums.dtype)"),
    ("silent_rows_count", "over_ranks(result, process_group, student, class_dim, «mask, ignored»)",
     "target, index"),
)  # fmt: skip
_of(
    "kdkernels", "_rowwise.py", "test_dtensor.py", "every",
    ("labels_wrap", "return «target.to(torch.int64)», _checks.NO_INDEX if", "target"),
    ("shards_unseen",
     "if «not sharded and any_sharded(target, token_weight, *numbers, *options)»:", "False"),
)  # fmt: skip

# Teachers: containers, targets, caches, servers' answers.

_of(
    "kdkernels/teacher", "sparse.py", "test_teacher.py", "rows or index or check or to",
    ("entries_indexed", "    entries = «(*parts, slice(None)) if any(part is Ellipsis for part in"
     " parts) else parts»\n", "parts"),
    ("rest_rounded", "rest = None if self.log_rest is None else moved(self.log_rest«»)\n",
     ", dtype"),
    ("absent_ids_checked", "bad = beyond «& present»", ""),
    ("absent_ids_twice", "_sorted(«torch.where(present, ids, own)»)", "ids"),
    ("rest_uncounted", "total = «total.logaddexp(flat.log_rest.double())»", "total"),
)  # fmt: skip
_of(
    "kdkernels/teacher", "linear.py", "test_teacher.py", "logits",
    ("all_rows", "hidden = «hidden[rows]»", "hidden"),
)  # fmt: skip
_of(
    "kdkernels/teacher", "targets.py", "test_teacher_targets.py", "not memory",
    ("rest_by_difference", "        torch.sub(rest, total, out=log_rest[part])\n",
     "        log_rest[part] = torch.log1p(-logprobs[part].exp().sum(1))\n"),
    ("rest_unsoftened", "rest = (base - top[:, 0])«.div_(temperature)».add_(log_sum)", ""),
    ("others_unsoftened", "if «temperature != 1.0»:", "False"),
    ("rest_of_none", "base = «torch.where(base == -torch.inf, 0.0, base)»", "base"),
    ("one_draw_a_row", "torch.minimum(«draws[part]» * total, below)",
     "draws[part][:, :1] + 0 * draws[part]"),
    ("edge_of_the_one_before", "points, right=«True»", "False"),
    ("counts_as_one", "torch.ones_like(draws[part]))", "torch.ones_like(draws[part]) / n)"),
    ("shifted_rows", "            start += part.shape[:-1].numel()\n", ""),
)  # fmt: skip
_of(
    "kdkernels/teacher", "writer.py", "test_teacher_cache.py", "written or absent or lengths",
    ("absent_ids_kept", "        ids[start:stop].masked_fill_(logprobs[start:stop]"
     " == -torch.inf, 0)\n",
     ""),
    ("narrow_rows_stale", "        logprobs[start:stop, width:] = -torch.inf\n", ""),
    ("shard_overfull", "if start and «start + tokens > self._capacity»:", "start > self._capacity"),
    ("close_on_error", "if «kind is None»:", "True", "test_teacher_cache.py", "exception"),
)  # fmt: skip
_of(
    "kdkernels/teacher", "reader.py", "test_teacher_cache.py",
    "damaged or own or shards or indices",
    ("views_of_the_map", "piece[start:stop]«.clone()»", ""),
    ("hash_unread", "if «self.hash != _format.cache_hash(self.facts, self._shards)»:", "False"),
    ("size_unread", "if «size != shard[\"bytes\"]»:", "False"),
    ("metadata_unread", "if «found.get(name) != value»:", "False"),
    ("shapes_unread", "if «tensors != stored»:", "False"),
    ("first_goes", "self._open.popitem(last=«False»)", "True"),
)  # fmt: skip
_of(
    "kdkernels/teacher", "batches.py", "test_teacher_cache.py", "collate or entries or batch",
    ("labels_unshifted", "labels[row, : n - 1] = «tokens[1:]»", "tokens[:-1]"),
    ("uncovered_rows_count", "    labels.masked_fill_((logprobs == -torch.inf)"
     ".all(-1), ignore_index)\n",
     ""),
    ("padding_has_no_mass", "log_rest = torch.«zeros»(shape, dtype=_widest(rests))", "ones"),
)  # fmt: skip
_of(
    "kdkernels/teacher", "importers.py", "test_teacher_importers.py", "vllm or trl",
    ("unshifted", "rows = [_position(f\"{name}[{i}]\", entry)[:k] for i, entry in"
     " enumerate(entries) if i]\n    width = k or max(map(len, rows), default=0)\n«»",
     "    rows = [[], *rows[:-1]]\n"),
    ("as_they_come", "return sorted(row, key=«lambda item: (-item[1], item[0])»)",
     "lambda item: 0"),
    ("padding_read", "    logprobs.masked_fill_(padding[..., None], -torch.inf)\n", ""),
)  # fmt: skip
_of(
    "kdkernels/losses", "acceptance.py", "test_language_models.py", "acceptance",
    ("distance_always", "near = distance < «0.5»", "1.5"),
    ("gradient_sign", "«distance.detach() - distance»", "distance - distance.detach()"),
    ("kl_alone", "else KD_OF_TOKENS), «distance», eta)", "0 * distance",
     "test_language_models.py", "speculators"),
)  # fmt: skip
_of(
    "kdkernels/reference", "acceptance.py", "test_language_models.py test_gradcheck.py",
    "acceptance or speculators",
    ("weight_moves", "torch.exp(eta * («distance.detach()» - 1))", "distance"),
    ("weights_swapped", "weighted(distance, «1 - weight»)", "weight"),
    ("distance_always", "near = distance < «0.5»", "1.5"),
    ("floor_lost", "tiny * LEAST", "tiny"),
)  # fmt: skip
_of(
    "kdkernels", "_head.py", "test_linear_head.py test_linear_logprob.py test_teacher.py",
    "every_divergence or published or logits",
    ("softcap_first", "scale = self.logit_scale / (self.softcap or 1.0)",
     "scale = 1.0 / (self.softcap or 1.0)"),
    ("cap_dropped", "logits.tanh_()«.mul_(self.softcap)»", ""),
    ("autocast_reaches_in", "enabled=«False»", "True"),
    ("bias_unscaled", "beta = 0.0 if self.bias is None else «scale»", "1.0"),
    ("tanh_not_differentiated", "grad_input(gradient, logits, grad_input=gradient)",
     "grad_input(gradient, logits * 0, grad_input=gradient)"),
)  # fmt: skip
_of(
    "kdkernels/linear", "_chunks.py", "test_linear_head.py",
    "every_divergence or reductions or not_read or zero_with or shifted or no_labels",
    ("last_chunk_alone", "beta = 0.0 if «self._first» else 1.0", "True"),
    ("first_sum_of_garbage", "beta = «0.0» if self._first else 1.0", "1.0"),
    ("scale_lost", "type(at) is slice «and scale == 1.0»:", ""),
    ("ignored_kept", "index = (labels.long() «!=» ignore_index)", ">="),
    ("nothing_unset", "        if self._first:\n            «self.weight.zero_()»", "pass"),
)  # fmt: skip
_of(
    "kdkernels/linear", "_op.py", "test_linear_head.py", "reductions or twice",
    ("upstream_lost", "return gradient.mul_(«upstream»)", "1.0"),
    ("given_twice", "gradients, ctx.gradients = ctx.gradients, «None»", "ctx.gradients"),
    ("rows_unweighted", "weights = [«rows if x is None else x * rows» for x in weights]", "x"),
    ("twice_silently", "g = «once(g, upstream, tensors[i])»", "g"),
    ("half_stored", "ctx.stored = not by_row« and hidden.dtype != torch.float16»", "",
     "test_head_corners.py", "loss_scale"),
)  # fmt: skip
_of(
    "kdkernels/linear", "kd.py", "test_head_corners.py", "nan or weight",
    ("nan_spreads", "flat = «torch.where((labels != index).unsqueeze(-1), flat, 0.0)»", "flat"),
    ("weight_of_the_ignored", "added = «torch.where(of_rows[0].ne(index), added, 0.0)»", "added"),
)  # fmt: skip
_of(
    "kdkernels/reference", "refilled.py", "test_embedding_refilled.py", "bad_embedding",
    ("bad_unseen", "return «0.0 * distance.detach().sum()»", "torch.zeros_like(distance[0, 0])"),
)  # fmt: skip
_of(
    "kdkernels/linear", "_sparse.py", "test_linear_head.py", "sparse",
    ("mass_lost", "weight = own if weight is None else «own * weight»", "weight"),
    ("hard_unweighted", "hard_upstream = hard_upstream * hard_weight", "pass"),
    ("hard_lost", "numbers, through, «hard_upstream», how", "None"),
    ("infinite_of_0", "hard_values = «weighted(numbers[_topk.HARD], hard_upstream)»",
     "numbers[_topk.HARD] * hard_upstream", "test_head_corners.py", "infinite"),
)  # fmt: skip
_of(
    "kdkernels/linear", "_teachers.py", "test_linear_head.py", "sparse or vocabularies",
    ("silent_rows_counted", "of_known(«known.says», flat", "known.says | True"),
    ("longer_prefix", "common = «min»(of_student, of_teacher)", "max"),
    ("ids_unchecked", "    if «look»:", "False"),
)  # fmt: skip
_of(
    "csrc", "ops_topk.cpp", "test_linear_logprob.py", "published or certain or inference",
    ("rows_without_a_gap", "made.stride[0] = x.stride(0);", ""),
)  # fmt: skip
_of(
    "kdkernels/linear", "_logprob.py", "test_linear_logprob.py",
    "published or certain or inference",
    ("others_of_all", "below.exp()«.scatter_(1, largest, 0.0)».sum(", ""),
    ("difference", "own.gather(1, q.largest) - total + «q.others * total»",
     "total - (1 - q.others) * total"),
    ("repeated_first", "repeated[:, 1:] = ordered[:, 1:] «==» ordered[:, :-1]", "!="),
    ("inference", "    «save(ctx, (*inputs[:4], call.symbolic))»",
     "ctx.outside = None; ctx.save_for_backward(*inputs[:4], call.symbolic)"),
    ("twice_counted", "_topk.marked(asked, «first != places»)", "first < 0"),
    ("origin_lost", "+ chunk.of_rows[0] / chunk.how.numbers[0]", "+ 0.0"),
    ("origin_unsoftened", "chunk.of_rows[0] «/ chunk.how.numbers[0]»", ""),
    ("rest_unpulled", "slopes = own - q.log.exp() * «total»", "1.0"),
)  # fmt: skip
_of(
    "kdkernels/reference", "sampled_kl.py", "test_sampled.py", "published or expect",
    ("k3_of_the_other", "torch.expm1(d) - d", "torch.expm1(-d) + d"),
    ("k1_sign", "return «-d»", "d"),
    ("half", "return d * d «/ 2» if", ""),
)  # fmt: skip
_of(
    "kdkernels/losses", "sampled_kl.py", "test_sampled.py", "published or named",
    ("sign", "hard=«-1.0»", "1.0"),
    ("ids_unchecked", "«bad.any()»:\n        raise", "False"),
)  # fmt: skip
_of(
    "kdkernels", "_rowrun.py", "test_sampled.py test_language_models.py test_hard_weight.py",
    "sampled or ignored or keywords or acceptance",
    ("id_is_ignored", "weight, ignored = None, «_checks.NO_INDEX»", "call.ignore_index"),
    ("ignored_ids_read", "torch.where(«target.long() == call.ignore_index», ignored,",
     "target.long() != target.long()"),
    ("hard_unweighted", "index, weight, ignored = target, «call.hard_token_weight», call.",
     "None"),
    ("entropy_lost", "            spread = separate[2].reshape(-1)\n", "            pass\n"),
)  # fmt: skip

# Sparse teachers.

_of(
    "csrc/cpu", "topk_row.h", "test_topk_rows.py", "native or ids",
    ("twice_unseen", "seen[at / 64] |= bit;", ""),
    ("ignored_row_read", "return problem.target && «problem.target[row] == problem.ignore_index»;",
     "false"),
)  # fmt: skip
_of(
    "csrc/cpu", "topk_sums.h", "test_topk_rows.py", "native or ids",
    ("ids_in_the_rest", "x[scratch.apart[i] - begin] = «value»;", "x[scratch.apart[i] - begin]"),
    ("maximum_of_an_id", "replace(kNone);", ""),
    ("sum_not_rescaled", "of.sum *= factor;", ""),
    ("hard_not_rescaled", "of.hard *= std::exp(gap);", ""),
    ("moment_of_the_old_origin", "of.moment = «(of.moment + gap * of.sum)» * factor;", "of.moment"),
    ("target_not_in_the_rest", "rest_sum += std::exp((at_target - rest_top) * inverse);", ""),
    ("target_among_others", "if (row.target >= 0 && «row.ids[k] != row.target») others", "true"),
    ("rest_from_the_origin", "row.number(kRestTop) = some ? «R(rest_top)» : R(0);", "R(origin)"),
    ("kept_from_the_last_origin", "kept.origins[b] = «of.max»;", "0.0",
     "test_topk.py", "at_once"),
)  # fmt: skip
_of(
    "csrc/cpu", "topk.h", "test_topk_rows.py", "native or ids",
    ("temperature_of_the_ids", "double value = «double(g[k]) * inverse»;", "double(g[k])"),
    ("hard_of_the_ids", "value += «b * std::exp(double(widen(z[id])) - origin - others)»;", "0.0"),
    ("ids_not_patched", "to[row.ids[k]] = narrow<T>(R(scratch.logits[k]));", ""),
    ("one_exponential_at_any_temperature", "if («row.temperature == 1.0» && a != 0.0", "true"),
    ("kept_by_the_origin", "(kept.origins[b] - «top») / row.temperature",
     "double(row.number(kOrigin))", "test_topk.py", "at_once"),
    ("kept_rest", "store<R>(from + whole, «V(load<R>(from + whole) * factor)»);",
     "load<R>(from + whole)", "test_topk.py", "at_once"),
)  # fmt: skip
_of(
    "csrc/cpu", "topk_loss.h", "test_topk.py", "at_once",
    ("cross_entropy_unweighted", "«(hard_weight ? hard_weight[i] : R(1))»", "R(1)"),
    ("cross_entropy_lost", "values[row] += hard;", ""),
    ("weight_of_the_first_row", "one.token_weight = «at(one.token_weight, 1)»;",
     "one.token_weight"),
)  # fmt: skip
_of(
    "csrc/cpu", "evaluate.cpp", "test_topk.py", "at_once",
    ("mean_over_ignored_ids", "«rows.target[row] != rows.ignore_index»", "true"),
    ("cross_entropy_of_all_rows", "problem.hard /= double(live);", ""),
)  # fmt: skip
_of(
    "kdkernels/triton", "topk.py", "test_topk_rows.py", "triton or ids",
    ("ids_in_the_rest", "«logits = tl.where(apart, none, logits)»", "logits = logits"),
    ("twice_unseen", "((«ordered == after») & (entry + 1 < k))", "ordered != ordered"),
    ("target_not_in_the_rest", "rest_sum += tl.exp((alone - shift) / heat)\n", "rest_sum += 0\n"),
    ("ids_of_the_last_block",
     "end = tl.sum((ordered < «start + BLOCK»).to(tl.int32))\n            apart", "start"),
    ("ids_as_the_rest", "out = tl.where(«apart», own, share) / heat", "apart & False"),
    ("ignored_gradient", "out = tl.where(«live», out, 0.0)", "live | True"),
)  # fmt: skip
_of(
    "kdkernels/reference", "dist.py", "test_dist_ignored.py", "reference and equals",
    ("ignored_values", "inter = «torch.where(counted, inter, 0.0)»", "inter"),
    ("columns_of_nothing", "intra = «torch.where(counted.any(), intra, 0.0)»", "intra"),
    ("columns_of_all_rows", "intra = 1 - pearson(q, p, 0, eps«, mask»)", ""),
)  # fmt: skip
_of(
    "kdkernels/reference", "topk.py", "test_topk_rows.py", "reference",
    ("absent_is_an_id", "scatter_add(-1, ids, «present.to(torch.int32)»)",
     "torch.ones_like(ids, dtype=torch.int32)"),
    ("no_temperature", "scaled = (student - origin) «/ temperature»", ""),
)  # fmt: skip
_of(
    "kdkernels/losses", "topk_kd.py", "test_topk.py", "native or reference",
    ("normalised_drop", "values = mass * values + «torch.special.xlogy(mass, mass)»", "0"),
    ("absent_rows_count", "known = «(logprobs != -torch.inf)».any(-1)", "(logprobs == logprobs)"),
    ("rest_kept", "small = torch.cat([small[:, :-1], last], -1)", "small"),
    ("rest_rounded", "(marked != NO_ID).sum(-1) >= «classes»", "classes + 1",
     "test_head_corners.py", "all_classes"),
    ("rest_given_is_forgotten", "rest = «log_rest.reshape(-1, 1)».to(dtype)",
     "torch.log1p(-logprobs.exp().sum(-1, keepdim=True).clamp(max=1))"),
    ("mass_of_the_ignored", "torch.where(«valid», x, 0.0).reshape(ids.shape[:-1])", "valid | True"),
)  # fmt: skip
_of(
    "kdkernels", "_shapes.py", "test_class_dim.py", "equals or parts or errors",
    ("classes_elsewhere", "x = x.movedim(self.dim, «1»)", "-1"),
    ("last_is_not_last", "self._last = «self.dim == rank - 1»", "False"),
    ("rows_unchecked", "if «x.shape != self.rows»:", "False"),
    ("rows_stay_flat", "return x.reshape(self.rows) if «x.dim()» else x", "False"),
    ("positions_are_rows", "if «not self._last and rank > 2»:", "False"),
)  # fmt: skip
_of(
    "kdkernels/losses", "refilled.py", "test_embedding_refilled.py", "ignored",
    ("ignored_are_local", "absent = ~(present« & counted.unsqueeze(1)»)", ""),
    ("ignored_in_range", "_embedding.in_range(target, classes, «ignored»)", "-1"),
)  # fmt: skip
_of(
    "kdkernels", "_ensemble.py", "test_ensemble.py", "mean or half or temperatures or class_dim",
    ("mean_of_logits", "torch.log_softmax(x.to(kind) / heat, class_dim)", "x.to(kind) / heat"),
    ("cold_mean", "return total« * heat»", ""),
    ("numbers_as_logarithms", "«math.log(w) - math.log(largest)» for w", "w / largest"),
    ("weights_as_logarithms", "weights.to(kind)«.log()»", ""),
    ("heats_of_all_rows", "cut = [«_narrow(x, over, begin, size)» for x in", "x"),
    ("members_alone", "kind = working_dtype(«student, »*members)", "",
     "test_ensemble.py", "digits"),
)  # fmt: skip

# Finite masks, offsets, teachers and batches of nothing.

_of(
    "kdkernels/reference", "_rows.py", "test_corners.py", "finite_mask and reference",
    ("masks_as_origins", "lost = (log_q_best < «-20»)", "-1e30"),
)  # fmt: skip
_of(
    "kdkernels/reference", "hard.py", "test_corners.py", "offset and reference",
    ("offset_of_labels", "student = student« - top(student)»", ""),
)  # fmt: skip
_of(
    "kdkernels/triton", "blocks.py", "test_corners.py", "without_a_class and triton",
    ("certain_of_nothing", "(teacher_sum < 1.125)« & (teacher_sum > 0)»", ""),
)  # fmt: skip
_of(
    "kdkernels", "_checks.py", "test_corners.py", "no_items and kd",
    ("none_divided", "torch.where(«value == 0», 1, value)", "value < 0"),
)  # fmt: skip

# The teacher's gradient.

_of(
    "kdkernels", "_rowrun.py", "test_teacher_grad.py", "native and roles",
    ("roles_kept", "options=options, «student=teacher, teacher=student»))",
     "student=student, teacher=teacher"),
    ("hard_of_the_teacher", "student=student, hard=«0.0», parts=False", "call.hard",
     "test_teacher_grad.py", "native and keywords"),
    ("twice_silently", "teacher=«differentiable_once(teacher)»))", "teacher",
     "test_teacher_grad_surroundings.py", "names_no_exchanged"),
)  # fmt: skip
_of(
    "kdkernels", "_autograd.py", "test_teacher_grad.py", "native and roles",
    ("one_side", "return upstream, «upstream»", "0 * upstream"),
    ("roles_kept", "«loss(teacher, student.detach())»)", "loss(student, teacher.detach())",
     "test_teacher_grad.py", "native and dist"),
)  # fmt: skip
_of(
    "kdkernels/losses", "jsd.py", "test_teacher_grad.py", "native and roles",
    ("beta_kept", "(\"jsd\", («1.0 - beta»,))", "beta"),
)  # fmt: skip
_of(
    "kdkernels/reference", "_rows.py", "test_teacher_grad.py", "reference and plain",
    ("teacher_still", "moves = by_q« - by_p»", ""),
)  # fmt: skip
_of(
    "kdkernels", "_resize.py", "test_resize.py", "hand or half or errors",
    ("resized_in_half", "resized(«student.to(working_dtype(student, teacher))», teacher)",
     "student"),
    ("any_way", "not isinstance(value, str) or «value != \"bilinear\"»", "False"),
)  # fmt: skip
_of(
    "kdkernels", "_decoupled.py", "test_teacher_grad.py", "native and (dkd or aekt)",
    ("target_stays", "[x.scatter(1, index, «-torch.inf») for x in (s, t)]", "0.0"),
    ("weight_lost", "weighted(explicit, «weight_of_ratio(log_p, log_p - log_q, *ratio)»)", "1.0"),
    ("nothing_else", "implicit = reverse_kl(others[1], others[0], «valid & some»)", "valid",
     "test_teacher_grad.py", "excluded"),
    ("one_temperature", "rescale(s, t, «temperature», call.standardize)", "1.0"),
)  # fmt: skip
_of(
    "kdkernels/losses", "acceptance.py", "test_teacher_grad.py", "native and acceptance",
    ("roles_kept", "«REVERSE_KL» if kind == EXCHANGED", "KD_OF_TOKENS"),
)  # fmt: skip
_of(
    "kdkernels", "_soft_targets.py", "test_soft_targets.py", "native and (dkd or aekt)",
    ("others_lost", "soft = soft + «of_rows(explicit.to(dtype), scale, token_weight)»", "0.0"),
    ("no_others", "not others.is_cpu or «bool(others.any())»", "False"),
    ("kl_lost", "shares = (shares * «named[\"beta\"]»).to(dtype)", "0.0"),
    ("class_twice", "torch.where(first == second, «0.0», factors[1])", "factors[1]"),
    ("cancels", "few = «(weights != 0).sum(-1, keepdim=True) <= 2»", "first == first"),
    ("half_slope", "row.factors.mul_(row.q - row.p)«.div_(1.0 - row.q)»", ""),
    ("infinite_part", "return torch.where(x.isinf(), «0.0», x)", "x", "test_soft_targets.py",
     "excluded"),
    ("one_label", "* logsumexp(below)« - weighted(below, others).sum(-1)»", "",
     "test_soft_targets.py", "keywords"),
)  # fmt: skip
