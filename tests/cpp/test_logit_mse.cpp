// logit_mse on the CPU: every pair of dtypes, lengths around every vector's, plain and centred.
#include "check.h"
#include "kl_math.h"

using namespace test;

namespace {

struct Form {
  bool center, per_class;
  double scale;
};

void run(Matrix student, const Matrix& teacher, int64_t classes, const Form& form, const std::string& name) {
  const int64_t rows = student.rows;
  std::vector<double> weight(rows);
  for (int64_t r = 0; r < rows; ++r) weight[r] = r % 3 == 1 ? 0 : 0.5 + double(r % 3);

  // The definition in long double.
  Real expected = 0;
  std::vector<Real> expected_student(rows * student.width), expected_teacher(rows * teacher.width);
  for (int64_t r = 0; r < rows; ++r) {
    if (weight[r] == 0) continue;
    std::vector<Real> d(classes);
    Real mean = 0;
    int64_t counted = 0;
    for (int64_t k = 0; k < classes; ++k) {
      if (student.get(r, k) == -kInf && teacher.get(r, k) == -kInf) continue;
      mean += d[k] = Real(student.get(r, k)) - teacher.get(r, k);
      ++counted;
    }
    mean = form.center ? mean / counted : 0;
    const Real scale = form.scale * weight[r] / (form.per_class ? counted : 1);
    for (int64_t k = 0; k < classes; ++k) {
      if (student.get(r, k) == -kInf) continue;
      expected += scale * (d[k] - mean) * (d[k] - mean);
      expected_student[r * student.width + k] = scale * (d[k] - mean);  // 2 times grad_scale = 0.5
      expected_teacher[r * teacher.width + k] = -expected_student[r * student.width + k];
    }
  }

  const DType computed = compute_type(student.dtype, teacher.dtype);
  std::vector<double> row_loss(rows), row_stats(rows * kdfast::MseStat::count);
  Matrix grad_student(student.dtype, rows, student.width, 1), grad_teacher(teacher.dtype, rows, teacher.width, 5);
  auto args = args_for<kdfast::LogitMseArgs>(student, teacher, classes);
  args.center = form.center;
  args.per_class = form.per_class;
  args.scale = form.scale;
  args.weight = {weight.data(), kdfast::NumberType::f64};
  args.grad_scale = 0.5;
  args.row_loss = row_loss.data();
  args.row_stats = form.center ? row_stats.data() : nullptr;
  args.grad_student = grad_student.gradient();
  kdfast::cpu::logit_mse_forward(args, 0, rows);

  const Real loss = total(row_loss.data(), computed, rows);
  const Real error = std::abs(loss - expected);
  check_error(expected > 0 ? error / expected : error, loss_budget(computed), name + " loss");
  check_gradient(grad_student, expected_student, computed, name + " student's gradient, forward");

  args.grad_student = {};
  args.grad_teacher = grad_teacher.gradient();
  kdfast::cpu::logit_mse_backward(args, 0, rows);
  check_gradient(grad_teacher, expected_teacher, computed, name + " teacher's gradient, backward");
  args.grad_student = student.gradient();
  kdfast::cpu::logit_mse_backward(args, 0, rows);
  check_gradient(student, expected_student, computed, name + " student's gradient, backward in place");
  check_gradient(grad_teacher, expected_teacher, computed, name + " teacher's gradient, backward for both");
}

}  // namespace

int main() {
  skip_without_isa();
  const Form forms[] = {{false, false, 1}, {true, false, 1}, {true, true, 0.5}};
  unsigned seed = 0;
  for (const DType s : kDTypes)
    for (const DType t : kDTypes)
      for (const int64_t classes : {1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 64, 100, 513})
        for (const Form& form : forms) {
          ++seed;
          Matrix student = random_logits(s, 5, classes + seed % 4, seed),
                 teacher = random_logits(t, 5, classes + seed % 3, seed + 1);
          for (int64_t k = 0; k < student.width; ++k) student.set(1, k, kNan);  // a row of weight 0
          for (int64_t k = 1; k < classes; k += 5) student.set(2, k, -kInf), teacher.set(2, k, -kInf);
          run(student, teacher, classes, form,
              std::string(kDTypeNames[int(s)]) + "-" + kDTypeNames[int(t)] + " K=" + std::to_string(classes) +
                  (form.center ? " centred" : ""));
        }
  return report();
}
