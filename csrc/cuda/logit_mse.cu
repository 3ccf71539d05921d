// Squared difference of the logits on CUDA, by the rows of logit_difference.cuh or by none (joined_rows.cuh). With `center` the
// slice stays in registers until the row's mean is known.
#include "joined_rows.cuh"

namespace kdfast::cuda {

size_t workspace_bytes(const LogitMseArgs& args) {
  return args.center || args.per_class ? workspace_bytes<Centred>(args, MseStat::count)
                                       : workspace_of_uncentred<Uncentred<Square<float>>>(args);
}

void logit_mse_forward(const LogitMseArgs& args, const Call& call) {
  if (args.center || args.per_class)
    run_forward<Centred>(args, call, MseStat::count, "logit_mse", passes_forward_kernel<Square, double>);
  else
    run_uncentred_forward<Square<float>>(args, call, "logit_mse", passes_forward_kernel<Square, double>);
}
void logit_mse_backward(const LogitMseArgs& args, const Call& call) {
  if (args.center || args.per_class)
    run_backward<Centred>(args, call, MseStat::count, "logit_mse", passes_backward_kernel<Square, double>);
  else
    run_backward<Uncentred<Square<float>>>(args, call, 0, "logit_mse", passes_backward_kernel<Square, double>);
}

}  // namespace kdfast::cuda
