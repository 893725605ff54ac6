// The schemas of all operators. equifast/ops.py gives them fakes and derivatives, and says what they do.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(equifast, m) {
  m.def("warp(Tensor images, Tensor theta, int[] heights, int[] widths) -> Tensor[]");
  m.def("warp_adjoint(Tensor[] gradients, Tensor theta, int height, int width) -> Tensor");
  // Returns the similarities and the sums that the backward pass wants.
  m.def("similarity(Tensor anchor, Tensor[] views, Tensor theta, bool pixel) -> (Tensor, Tensor)");
  // Returns the gradients of the anchor and of each view.
  m.def(
      "similarity_backward(Tensor upstream, Tensor sums, Tensor anchor, Tensor[] views, Tensor theta, bool "
      "pixel)"
      " -> Tensor[]");
  // Of a single view, with one cosine per image: returns the similarity (N, 1) and its gradient with respect
  // to the view, and adds that with respect to the anchor to `total`.
  m.def(
      "similarity_gradient(Tensor(a!) total, Tensor anchor, Tensor view, Tensor theta) -> (Tensor, Tensor)");
  // With one cosine per image: returns the similarities and the gradient of their sum with respect to the
  // anchor.
  m.def("similarity_target(Tensor anchor, Tensor[] views, Tensor theta) -> (Tensor, Tensor)");
  // Of all pairs of maps (N, C, H, W): returns the sums of their cosines (N,), and what the backward pass
  // wants.
  m.def("pair_similarity(Tensor[] maps) -> (Tensor, Tensor, Tensor)");
  m.def("pair_similarity_backward(Tensor upstream, Tensor total, Tensor sums, Tensor[] maps) -> Tensor[]");
  m.def(
      "signed_step(Tensor x, Tensor gradient, Tensor origin, float eps, float step, float sigma, int seed, "
      "Tensor ids, int draw, int t) -> Tensor");
  // Returns the images and what the backward pass wants: the mean gray of each after brightness.
  m.def("color_jitter(Tensor images, Tensor parameters) -> (Tensor, Tensor)");
  m.def("color_jitter_backward(Tensor upstream, Tensor mean, Tensor images, Tensor parameters) -> Tensor");
  // (O, I, J) -> (O, G, I, J), by an order (G, J), and the transpose.
  m.def("turn_filters(Tensor filters, Tensor order) -> Tensor");
  m.def("turn_filters_adjoint(Tensor turned, Tensor order) -> Tensor");
  // Of images (N, C, H, W) by transformed filters (O / 16, 36, C, 16) and a bias (O), padding of rows and of
  // columns.
  m.def("winograd(Tensor x, Tensor filters, Tensor? bias, int dilation, int[] padding) -> Tensor");
  // Of maps (N, O, h, w) by filters (at least C / 16, kernel height, kernel width, O, 16) to (N, C, H, W);
  // or, of blocks of stride x stride pixels, by filters with channels for each.
  m.def(
      "conv_transpose(Tensor x, Tensor filters, int channels, int[] size, int stride, int[] padding, bool "
      "blocks) -> Tensor");
}
