// softmax-KL at temperature tau on CUDA: the launches of kl_div_tau.cuh.
#include "kl_div_tau.cuh"

namespace kdfast::cuda {
namespace {

__global__ void __launch_bounds__(256, 1)
    wide_forward_kernel(const __grid_constant__ KlDivTauArgs args, const __grid_constant__ Task task) {
  __shared__ WideShared shared;
  const Team team(task.plan);
  const int64_t r = blockIdx.x;
  const double weight = args.weight.at(r, 1.0);
  WideKlRow row(args, r);
  double loss = 0;
  if (weight != 0) loss = row.reduce(team, shared) * args.scale * weight;
  if (team.leads()) {
    static_cast<double*>(args.row_loss)[r] = loss;
    if (args.row_stats)
      for (int i = 0; i < KlStat::count; ++i) static_cast<double*>(args.row_stats)[r * KlStat::count + i] = row.stat[i];
  }
  const auto alone = [](int64_t, double, double gradient) { return gradient; };
  if (weight != 0 && args.grad_student.data) row.gradients(team, task, r, weight, alone);
  zero_wide(team, args.grad_student, r, weight == 0 ? 0 : args.classes);
  zero_wide(team, args.grad_teacher, r, weight == 0 ? 0 : args.classes);
  finish<double>(task, args);
}

__global__ void __launch_bounds__(256, 1)
    wide_backward_kernel(const __grid_constant__ KlDivTauArgs args, const __grid_constant__ Task task) {
  const Team team(task.plan);
  const int64_t r = blockIdx.x;
  const double weight = args.weight.at(r, 1.0);
  if (weight != 0) {
    WideKlRow row(args, r);
    for (int i = 0; i < KlStat::count; ++i) row.stat[i] = static_cast<const double*>(args.row_stats)[r * KlStat::count + i];
    row.gradients(team, task, r, weight, [](int64_t, double, double gradient) { return gradient; });
  }
  zero_wide(team, args.grad_student, r, weight == 0 ? 0 : args.classes);
  zero_wide(team, args.grad_teacher, r, weight == 0 ? 0 : args.classes);
}

}  // namespace

size_t workspace_bytes(const KlDivTauArgs& args) { return workspace_bytes<KlDivTau>(args, KlStat::count); }

void kl_div_tau_forward(const KlDivTauArgs& args, const Call& call) {
  run_forward<KlDivTau>(args, call, KlStat::count, "kl_div_tau", wide_forward_kernel);
}
void kl_div_tau_backward(const KlDivTauArgs& args, const Call& call) {
  run_backward<KlDivTau>(args, call, KlStat::count, "kl_div_tau", wide_backward_kernel);
}

}  // namespace kdfast::cuda
