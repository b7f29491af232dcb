/* What the C++ nodes share: the tensors that kernels take, and the refusal of second derivatives. */

#pragma once

#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include "calls.h"

namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Maybe = std::optional<Tensor>;

bool is_plain(const Tensor &t)
{
    return t.is_cpu() && t.scalar_type() == at::kFloat && t.layout() == at::kStrided;
}

bool is_dense(const Tensor &t)
{
    return is_plain(t) && t.is_contiguous();
}

float *values_of(const Tensor &t)
{
    return t.defined() ? t.data_ptr<float>() : nullptr;
}

void note_change(const Tensor &t)
{
    if (!t.is_inference())
        t.unsafeGetTensorImpl()->bump_version();
}

/* A tensor as it is, computed from `source` in a way that has no derivative; as in `autograd.py`. */
struct Once : torch::autograd::Function<Once> {
    static Tensor forward(AutogradContext *, const Tensor &result, const Tensor &)
    {
        return result.clone();
    }

    static variable_list backward(AutogradContext *, variable_list)
    {
        TORCH_CHECK(false, "a Batch Kalman layer cannot be differentiated twice while it normalizes by its batch: take "
                           "such gradients in evaluation mode (model.eval()), or of bkn.to_batch_norm(model)");
    }
};

/* Let whoever asks for a derivative of the results be told that it is not known. */
void refuse_to_go_on(variable_list &results, const variable_list &gradients, const variable_list &saved)
{
    Tensor source; /* depends on all that the results depend on; a list is no input of a node */
    for (const variable_list *tensors : {&gradients, &saved})
        for (const Tensor &t : *tensors)
            if (t.defined() && t.requires_grad()) {
                Tensor nothing = t.unsqueeze(0).narrow(0, 0, 0).sum();
                source = source.defined() ? source.add(nothing) : nothing;
            }
    for (Tensor &result : results)
        if (source.defined() && result.defined())
            result = Once::apply(result, source);
}

} // namespace
