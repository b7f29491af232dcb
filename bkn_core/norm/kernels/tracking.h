/* What `tracking.py` does in a call of the kernels, from C++. */

#pragma once

#include "row.h"

namespace {

int (*run_track)(const Records *);

/* Reads the tensors of the records of `tracking.py`, as far as each is there, one after the other. */
struct Reader {
    const std::vector<Tensor> &tensors;
    size_t at = 0;
    bool fits = true;
    std::vector<Tensor> moved;

    const Tensor &next()
    {
        return tensors.at(at++);
    }
    float *vector(int64_t channels, bool moves)
    {
        const Tensor &t = next();
        fits = fits && is_dense(t) && t.dim() == 1 && t.size(0) == channels;
        if (fits && moves)
            moved.push_back(t);
        return fits ? t.data_ptr<float>() : nullptr;
    }
};

/* Move the innovations, sensitivities and moving statistics of layers, and count. Return the innovations as they were,
   or nothing where the kernel cannot take these tensors. `forms` says which tensors a record has, see `tracking.py`;
   `numbers` are three to a record, see `Tracked`. */
std::optional<std::vector<Tensor>> track(const std::vector<Tensor> &tensors, const std::vector<int64_t> &forms,
                                         const std::vector<double> &numbers, bool is_alone)
{
    size_t expected = 0;
    for (int64_t form : forms)
        expected += 1 + (form & 1 ? 6 : 0) + (form & 2 ? 2 : 0) + (form & 4 ? 1 : 0);
    if (tensors.size() != expected)
        return std::nullopt;
    Reader reader{tensors};
    std::vector<Tracked> rows;
    std::vector<Tensor> before, counts;
    std::vector<int64_t> widths;
    for (size_t i = 0; i < forms.size(); i++) {
        const Tensor &seen = reader.next();
        if (!is_dense(seen) || seen.dim() != 3)
            return std::nullopt;
        Tracked row = {};
        row.groups = seen.size(1), row.channels = seen.size(2), row.statistics = seen.data_ptr<float>();
        if (forms[i] & 1) {
            const Tensor &mean = reader.next(), &variance = reader.next();
            auto wide = seen.sizes().slice(1);
            if (!is_dense(mean) || !is_dense(variance) || mean.sizes() != variance.sizes() ||
                (mean.sizes() != wide && mean.sizes() != wide.slice(1)))
                return std::nullopt;
            row.prior_mean = mean.data_ptr<float>(), row.prior_variance = variance.data_ptr<float>();
            row.prior_stride = mean.dim() > 1 ? row.channels : 0;
            row.inside = reader.vector(row.channels, false);
            before.push_back(reader.tensors.at(reader.at)), widths.push_back(row.channels);
            row.innovation = reader.vector(row.channels, true);
            row.sensitivity = reader.vector(row.channels, true);
            row.newest = reader.vector(row.channels, false);
        }
        if (forms[i] & 2) {
            row.running_mean = reader.vector(row.channels, true);
            row.running_var = reader.vector(row.channels, true);
        }
        if (forms[i] & 4)
            counts.push_back(reader.next());
        row.weight = numbers[3 * i], row.momentum = numbers[3 * i + 1], row.eps = numbers[3 * i + 2];
        rows.push_back(row);
    }
    for (const Tensor &count : counts)
        if (!count.is_cpu() || count.scalar_type() != at::kLong)
            return std::nullopt;
    if (!reader.fits)
        return std::nullopt;
    at::AutoGradMode off(false);
    if (before.size() == 1)
        before[0] = before[0].clone();
    else if (!before.empty())
        before = at::cat(before).split_with_sizes(widths);
    Records all = {static_cast<int64_t>(rows.size()), is_alone ? at::get_num_threads() : 1, rows.data()};
    run_track(&all);
    for (const Tensor &t : reader.moved)
        note_change(t);
    for (const Tensor &count : counts) {
        ++*count.data_ptr<int64_t>();
        note_change(count);
    }
    return before;
}

} // namespace
