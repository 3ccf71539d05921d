// Squared difference of the logits on CUDA, by the rows of logit_difference.cuh. With `center` the slice stays in registers
// until the row's mean is known.
#include "logit_difference.cuh"

namespace kdfast::cuda {
namespace {}  // namespace

size_t workspace_bytes(const LogitMseArgs& args) {
  return args.center || args.per_class ? workspace_bytes<Centred>(args, MseStat::count)
                                       : workspace_bytes<Plain<Square<float>>>(args, 0);
}

void logit_mse_forward(const LogitMseArgs& args, const Call& call) {
  if (args.center || args.per_class)
    run_forward<Centred>(args, call, MseStat::count, "logit_mse", passes_forward_kernel<Square, double>);
  else
    run_forward<Plain<Square<float>>>(args, call, 0, "logit_mse", passes_forward_kernel<Square, double>);
}
void logit_mse_backward(const LogitMseArgs& args, const Call& call) {
  if (args.center || args.per_class)
    run_backward<Centred>(args, call, MseStat::count, "logit_mse", passes_backward_kernel<Square, double>);
  else
    run_backward<Plain<Square<float>>>(args, call, 0, "logit_mse", passes_backward_kernel<Square, double>);
}

}  // namespace kdfast::cuda
