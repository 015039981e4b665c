#include "grouped_gemm_sm90.h"

namespace sail::cuda::sm90 {
template <class T, class Problem, class Arguments>
bool run(const Problem& p, const Arguments& out, const Launch& launch) {
  return dispatch<T>(p, out, Start{launch});
}
template bool run<__half>(const RowsProblem&, const StoreRows&, const Launch&);
template bool run<__half>(const RowsProblem&, const GatedForward&, const Launch&);
template bool run<__half>(const RowsProblem&, const GatedBackward&, const Launch&);
template bool run<__half>(const WgradProblem&, const StoreGrad&, const Launch&);
}  // namespace sail::cuda::sm90
