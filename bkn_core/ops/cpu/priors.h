/* All priors and gains of a model: a program of the kernels, and the node that it is in a forward, as in `priors.py`. Where
   a backward pass only adds gradients to `.grad`, the program adds its own there in place when the pass is over: they then
   take neither memory nor a pass of their own. */

#pragma once

#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>

#include "once.h"

namespace {

int (*run_evaluate)(const Program *);
int (*run_reverse)(const Program *);

/* Call f with each row of a table of integers. */
template <class Function> void each_row(const Tensor &table, Function f)
{
    const int64_t *end = table.const_data_ptr<int64_t>() + table.numel();
    for (const int64_t *row = end - table.numel(); row < end; row += table.size(1))
        f(row);
}

/* Pieces of a row that are no views of it, so that they outlive a change of what it holds; of size 0: a single value. */
variable_list pieces_of(const Tensor &row, const std::vector<int64_t> &sizes)
{
    at::AutoDispatchBelowADInplaceOrView untracked;
    variable_list pieces;
    int64_t start = 0;
    for (int64_t size : sizes) {
        pieces.push_back(size ? row.narrow(0, start, size) : row.select(0, start));
        start += size ? size : 1;
    }
    return pieces;
}

/* See `KernelProgram` and `_Structure` in `kernel_program.py`. */
struct Lowered : torch::CustomClassHolder {
    Tensor fields, parameters, layouts, gradients; /* (n, fields), (n, 2), (n, 2), (n, 4) */
    std::vector<Tensor> indices;                   /* which the fields point into */
    std::vector<int64_t> sizes, moving;            /* of the pieces of the results; numbers of tensors that move */
    int64_t accumulates, size;

    Lowered(std::vector<Tensor> tables, std::vector<Tensor> indices, std::vector<int64_t> sizes,
            std::vector<int64_t> moving, int64_t accumulates, int64_t size)
        : fields(tables.at(0)), parameters(tables.at(1)), layouts(tables.at(2)), gradients(tables.at(3)),
          indices(std::move(indices)), sizes(std::move(sizes)), moving(std::move(moving)), accumulates(accumulates),
          size(size)
    {
    }

    Tensor filled(const variable_list &tensors) const
    {
        Tensor made = fields.clone();
        auto *to = made.data_ptr<int64_t>();
        each_row(parameters, [&](const int64_t *at) { to[at[0]] = reinterpret_cast<int64_t>(values_of(tensors[at[1]])); });
        each_row(layouts, [&](const int64_t *at) {
            to[at[0]] = tensors[at[1]].defined() && !tensors[at[1]].is_contiguous();
        });
        return made;
    }

    static void call(int (*kernel)(const Program *), const Tensor &instructions, const Tensor &values, const Tensor &to)
    {
        Program program = {instructions.size(0), at::get_num_threads(), values.data_ptr<float>(), values_of(to),
                           instructions.const_data_ptr<int64_t>()};
        TORCH_CHECK(!kernel(&program), "the priors found no memory");
    }

    /* Write to each target that there is the gradient of its tensor, or add to it. */
    void reverse(const variable_list &tensors, const Tensor &values, const Tensor &arena, const variable_list &targets,
                 const std::vector<bool> &adds) const
    {
        Tensor instructions = filled(tensors);
        auto *to = instructions.data_ptr<int64_t>();
        each_row(gradients, [&](const int64_t *at) {
            to[at[0]] = reinterpret_cast<int64_t>(values_of(targets[at[1]]));
            if (adds[at[1]])
                to[at[2] + accumulates] |= at[3];
        });
        call(run_reverse, instructions, values, arena);
    }

    /* Add to `.grad` of the leaves that are there: in place where it lies as its leaf does. */
    void add_gradients(const variable_list &tensors, const Tensor &values, const Tensor &arena,
                       const variable_list &leaves) const
    {
        variable_list targets(leaves.size());
        std::vector<bool> adds(leaves.size());
        for (size_t i = 0; i < leaves.size(); i++) {
            if (!leaves[i].defined())
                continue;
            const Tensor &present = leaves[i].grad();
            adds[i] = present.defined() && is_plain(present) &&
                      torch::autograd::utils::obeys_layout_contract(present, leaves[i]);
            targets[i] = adds[i] ? present : at::empty_like(leaves[i]);
        }
        reverse(tensors, values, arena, targets, adds);
        for (size_t i = 0; i < leaves.size(); i++) {
            if (!leaves[i].defined())
                continue;
            Tensor &grad = leaves[i].mutable_grad();
            if (adds[i])
                note_change(grad);
            else
                grad = grad.defined() ? grad.add(targets[i]) : targets[i];
        }
    }
};

int64_t sum_of_versions(const variable_list &tensors)
{
    int64_t sum = 0;
    for (const Tensor &t : tensors)
        sum += t.defined() ? t._version() : 0;
    return sum;
}

/* Whether nothing is to see the gradient of a leaf before it is complete. */
bool is_unwatched(const Tensor &leaf)
{
    return torch::autograd::impl::hooks(leaf).empty() && !torch::autograd::impl::post_acc_grad_hooks(leaf);
}

/* Return the leaves that the present backward pass adds the gradients of a node to, nothing where it does more. */
std::optional<variable_list> leaves_of(torch::autograd::Node &node)
{
    const auto *chosen = torch::autograd::get_current_graph_task_exec_info();
    if (at::GradMode::is_enabled() || !chosen || !chosen->empty())
        return std::nullopt;
    variable_list leaves;
    for (const auto &edge : node.next_edges()) {
        auto *leaf = dynamic_cast<torch::autograd::AccumulateGrad *>(edge.function.get());
        bool is_watched = leaf && !(is_unwatched(leaf->variable) && leaf->pre_hooks().empty() && leaf->post_hooks().empty());
        if ((edge.function && !leaf) || is_watched || (leaf && !is_plain(leaf->variable)))
            return std::nullopt;
        leaves.push_back(leaf ? leaf->variable : Tensor());
    }
    return leaves;
}

struct Predict : torch::autograd::Function<Predict> {
    static variable_list forward(AutogradContext *ctx, at::TensorList tensors, const c10::intrusive_ptr<Lowered> &program)
    {
        Tensor values = at::empty({program->size});
        variable_list saved = tensors.vec();
        Lowered::call(run_evaluate, program->filled(saved), values, Tensor());
        for (int64_t number : program->moving)
            saved[number] = Tensor();
        saved.push_back(values);
        ctx->save_for_backward(std::move(saved));
        ctx->set_materialize_grads(false);
        ctx->saved_data["program"] = program;
        return pieces_of(values, program->sizes);
    }

    static variable_list backward(AutogradContext *ctx, variable_list gradients)
    {
        bool is_recorded = at::GradMode::is_enabled();
        variable_list saved = ctx->get_saved_variables(), results;
        auto leaves = leaves_of(*torch::autograd::get_current_node());
        {
            at::AutoGradMode off(false);
            auto program = ctx->saved_data["program"].toCustomClass<Lowered>();
            Tensor arena = spread(*program, gradients);
            if (leaves)
                results = later(program, saved, arena, *leaves);
            else
                results = now(ctx, *program, saved, arena);
        }
        if (is_recorded)
            refuse_to_go_on(results, gradients, saved);
        results.emplace_back(); /* the program has no gradient */
        return results;
    }

    static Tensor spread(const Lowered &program, const variable_list &gradients)
    {
        Tensor arena = at::zeros({program.size});
        variable_list pieces = pieces_of(arena, program.sizes);
        for (size_t i = 0; i < pieces.size(); i++)
            if (gradients[i].defined())
                pieces[i].copy_(gradients[i]);
        return arena;
    }

    static variable_list now(AutogradContext *ctx, const Lowered &program, variable_list tensors, const Tensor &arena)
    {
        Tensor values = tensors.back();
        tensors.pop_back();
        variable_list targets(tensors.size());
        for (size_t i = 0; i < tensors.size(); i++)
            if (tensors[i].defined() && ctx->needs_input_grad(i))
                targets[i] = at::empty_like(tensors[i]);
        program.reverse(tensors, values, arena, targets, std::vector<bool>(tensors.size()));
        return targets;
    }

    static variable_list later(const c10::intrusive_ptr<Lowered> &program, variable_list tensors, const Tensor &arena,
                               const variable_list &leaves)
    {
        Tensor values = tensors.back();
        tensors.pop_back();
        torch::autograd::Engine::get_default_engine().queue_callback(
            [program, tensors, values, arena, leaves, version = sum_of_versions(leaves)] {
                TORCH_CHECK(version == sum_of_versions(leaves), "a parameter has changed before the backward pass through "
                                                                "its model was over: step the optimizer behind backward()");
                at::AutoGradMode off(false);
                program->add_gradients(tensors, values, arena, leaves);
            });
        return variable_list(tensors.size());
    }
};

variable_list predict(const c10::intrusive_ptr<Lowered> &program, const variable_list &tensors)
{
    return Predict::apply(at::TensorList(tensors), program);
}

} // namespace
