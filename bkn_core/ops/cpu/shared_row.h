/* All priors and gains of a model as one row that several forwards share, see `priors/accumulation.py`: it is filled
   when a block of forwards begins, and gives its gradient to the parameters when the block ends. */

#pragma once

#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/custom_class.h>
#include <torch/library.h>
#include <unordered_set>

#include "calls.h"

namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Maybe = std::optional<Tensor>;

int (*run_evaluate)(const Program *);
int (*run_reverse)(const Program *);

bool is_plain(const Tensor &t)
{
    return t.is_cpu() && t.scalar_type() == at::kFloat && t.layout() == at::kStrided;
}

bool is_dense(const Tensor &t)
{
    return is_plain(t) && t.is_contiguous();
}

void note_change(const Tensor &t)
{
    if (!t.is_inference())
        t.unsafeGetTensorImpl()->bump_version();
}

/* Pieces of a row that are no views of it, so that they outlive a change of what it holds. */
struct Parts : torch::autograd::Function<Parts> {
    static variable_list forward(AutogradContext *ctx, const Tensor &row, const std::vector<int64_t> &sizes)
    {
        at::AutoDispatchBelowADInplaceOrView untracked;
        variable_list parts;
        int64_t start = 0;
        for (int64_t size : sizes) {
            parts.push_back(size ? row.narrow(0, start, size) : row.select(0, start));
            start += size ? size : 1;
        }
        ctx->set_materialize_grads(false);
        ctx->saved_data["sizes"] = sizes;
        return parts;
    }

    static variable_list backward(AutogradContext *ctx, variable_list gradients)
    {
        auto sizes = ctx->saved_data["sizes"].toIntVector();
        for (size_t i = 0; i < sizes.size(); i++) {
            int64_t size = sizes[i] ? sizes[i] : 1;
            gradients[i] = gradients[i].defined() ? gradients[i].view({size}) : at::zeros({size});
        }
        return {at::cat(gradients), Tensor()};
    }
};

class SharedRow : public torch::CustomClassHolder {
    std::vector<Tensor> tensors, pieces;
    std::vector<std::pair<const void *, std::vector<int64_t>>> known; /* address and strides of each tensor */
    Tensor instructions, targets, values, row;
    int64_t accumulates, version = 0;

    /* Whether the kernels can read a tensor where they did, and add to its gradient in place: that of a leaf that nothing
       watches. */
    bool is_as_known(size_t i) const
    {
        const Tensor &t = tensors[i];
        if (t.is_inference() || !is_plain(t) || t.const_data_ptr() != known[i].first || t.strides() != known[i].second)
            return false;
        return !t.requires_grad() || (t.is_leaf() && torch::autograd::impl::hooks(t).empty() &&
                                      !torch::autograd::impl::post_acc_grad_hooks(t));
    }

    int64_t sum_of_versions() const
    {
        int64_t sum = 0;
        for (size_t i = 0; i < tensors.size(); i++)
            sum += tensors[i]._version();
        return sum;
    }

    void call(int (*kernel)(const Program *), Tensor &fields, float *gradients)
    {
        Program program = {fields.size(0), at::get_num_threads(), values.data_ptr<float>(), gradients,
                           fields.data_ptr<int64_t>()};
        TORCH_CHECK(!kernel(&program), "the priors found no memory");
    }

    /* Add to `.grad` of the tensors that want one what the gradient of the row says. */
    void add_gradients()
    {
        std::vector<Tensor> present(tensors.size()), found(tensors.size());
        for (size_t i = 0; i < tensors.size(); i++) {
            if (!tensors[i].requires_grad())
                continue;
            present[i] = tensors[i].grad();
            bool holds = present[i].defined() && is_plain(present[i]) && present[i].strides() == tensors[i].strides();
            found[i] = holds ? present[i] : at::empty_like(tensors[i]);
        }
        Tensor filled = instructions.clone(), gradients = at::zeros_like(values);
        gradients.narrow(0, 0, row.numel()).copy_(row.grad());
        auto *fields = filled.data_ptr<int64_t>();
        for (const int64_t *at = targets.data_ptr<int64_t>(), *end = at + targets.numel(); at < end; at += 4) {
            const Tensor &target = found[at[1]];
            if (!target.defined())
                continue;
            fields[at[0]] = reinterpret_cast<int64_t>(target.data_ptr<float>());
            if (target.is_same(present[at[1]]))
                fields[at[2] + accumulates] |= at[3];
        }
        call(run_reverse, filled, gradients.data_ptr<float>());
        for (size_t i = 0; i < tensors.size(); i++)
            if (found[i].is_same(present[i]))
                note_change(present[i]);
            else
                tensors[i].mutable_grad() = present[i].defined() ? present[i].add(found[i]) : found[i];
    }

public:
    /* `given` is what the program reads. `instructions` is (instructions, fields) with the addresses of the tensors;
       `targets` are (n, 4), see `_Structure` in `kernel_program.py`. `sizes` are the size of the arena and of the row. */
    SharedRow(std::vector<Tensor> given, Tensor instructions, Tensor targets, int64_t accumulates,
              std::vector<int64_t> sizes)
        : tensors(std::move(given)), instructions(std::move(instructions)), targets(std::move(targets)),
          accumulates(accumulates)
    {
        for (const Tensor &t : tensors)
            known.emplace_back(t.const_data_ptr(), t.strides().vec());
        values = at::empty({sizes[0]});
        row = values.narrow(0, 0, sizes[1]).requires_grad_();
    }

    /* Return the row and pieces of it (of size 0: a single value). */
    std::tuple<Tensor, std::vector<Tensor>> parts(std::vector<int64_t> sizes)
    {
        at::AutoGradMode on(true);
        pieces = Parts::apply(row, sizes);
        return {row, pieces};
    }

    /* Fill the row, and return whether that could be done. A backward pass through a forward of an earlier block sees newer
       versions. */
    bool begin()
    {
        std::unordered_set<const void *> different;
        for (size_t i = 0; i < tensors.size(); i++)
            if (!is_as_known(i) || (tensors[i].requires_grad() && !different.insert(tensors[i].unsafeGetTensorImpl()).second))
                return false;
        at::AutoGradMode off(false);
        call(run_evaluate, instructions, nullptr);
        for (const Tensor &piece : pieces)
            note_change(piece);
        row.mutable_grad() = Tensor();
        version = sum_of_versions();
        return true;
    }

    /* Pass the gradient of the row on, and return whether the tensors are those that it was filled from. */
    bool finish()
    {
        if (version != sum_of_versions())
            return false;
        at::AutoGradMode off(false);
        if (row.grad().defined())
            add_gradients();
        return true;
    }
};

} // namespace
