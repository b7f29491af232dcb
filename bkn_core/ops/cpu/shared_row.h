/* All priors and gains of a model as one row that several forwards share, see `priors/accumulation.py`: it is filled
   when a block of forwards begins, and gives its gradient to the parameters when the block ends. */

#pragma once

#include "priors.h"

namespace {

struct Parts : torch::autograd::Function<Parts> {
    static variable_list forward(AutogradContext *ctx, const Tensor &row, const std::vector<int64_t> &sizes)
    {
        ctx->set_materialize_grads(false);
        ctx->saved_data["sizes"] = sizes;
        return pieces_of(row, sizes);
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
    c10::intrusive_ptr<Lowered> program;
    variable_list tensors, pieces;
    std::vector<std::pair<const void *, std::vector<int64_t>>> known; /* address and strides of each tensor */
    Tensor instructions, values, row;
    int64_t version = 0;

    /* Whether the kernels can read a tensor where they did, and add to its gradient in place: that of a leaf that nothing
       watches. */
    bool is_as_known(size_t i) const
    {
        const Tensor &t = tensors[i];
        if (t.is_inference() || !is_plain(t) || t.const_data_ptr() != known[i].first || t.strides() != known[i].second)
            return false;
        return !t.requires_grad() || (t.is_leaf() && is_unwatched(t));
    }

public:
    /* `given` is what the program reads. */
    SharedRow(c10::intrusive_ptr<Lowered> lowered, std::vector<Tensor> given)
        : program(std::move(lowered)), tensors(std::move(given)), instructions(program->filled(tensors))
    {
        for (const Tensor &t : tensors)
            known.emplace_back(t.const_data_ptr(), t.strides().vec());
        values = at::empty({program->size});
        int64_t results = 0;
        for (int64_t size : program->sizes)
            results += size ? size : 1;
        row = values.narrow(0, 0, results).requires_grad_();
    }

    /* Return the row and its pieces. */
    std::tuple<Tensor, std::vector<Tensor>> parts()
    {
        at::AutoGradMode on(true);
        pieces = Parts::apply(row, program->sizes);
        return {row, pieces};
    }

    /* Fill the row, and return whether that could be done. A backward pass through a forward of an earlier block sees newer
       versions. */
    bool begin()
    {
        for (size_t i = 0; i < tensors.size(); i++)
            if (!is_as_known(i))
                return false;
        at::AutoGradMode off(false);
        Lowered::call(run_evaluate, instructions, values, Tensor());
        for (const Tensor &piece : pieces)
            note_change(piece);
        row.mutable_grad() = Tensor();
        version = sum_of_versions(tensors);
        return true;
    }

    /* Pass the gradient of the row on, and return whether the tensors are those that it was filled from. */
    bool finish()
    {
        if (version != sum_of_versions(tensors))
            return false;
        at::AutoGradMode off(false);
        if (!row.grad().defined())
            return true;
        Tensor arena = at::zeros_like(values);
        arena.narrow(0, 0, row.numel()).copy_(row.grad());
        variable_list leaves = tensors;
        for (Tensor &leaf : leaves)
            if (!leaf.requires_grad())
                leaf = Tensor();
        program->add_gradients(tensors, values, arena, leaves);
        return true;
    }
};

} // namespace
