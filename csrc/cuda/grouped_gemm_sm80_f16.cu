#include "grouped_gemm_sm80.h"
#include "kernels/dispatch_sm80.cuh"

namespace sail::cuda::sm80 {
template <class T, class Problem, class Arguments>
void run(const Problem& p, const Arguments& out, const Launch& launch) {
  dispatch<T>(p, out, Start{launch});
}
template void run<__half>(const RowsProblem&, const StoreRows&, const Launch&);
template void run<__half>(const RowsProblem&, const GatedForward&, const Launch&);
template void run<__half>(const RowsProblem&, const GatedBackward&, const Launch&);
template void run<__half>(const WgradProblem&, const StoreGrad&, const Launch&);
}  // namespace sail::cuda::sm80
