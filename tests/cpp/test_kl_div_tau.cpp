// kl_div_tau on the CPU: every pair of dtypes, lengths around every vector's, gradients from the forward and from the backward.
#include "check.h"
#include "kl_math.h"

using namespace test;

namespace {

struct Truth {
  std::vector<Real> row_loss, grad_student, grad_teacher;
};

// The definition in long double.
Truth oracle(const Matrix& student, const Matrix& teacher, const kdfast::KlDivTauArgs& args, const std::vector<float>& weight,
             const std::vector<float>& grad_loss) {
  Truth truth{std::vector<Real>(student.rows), std::vector<Real>(student.rows * student.width),
              std::vector<Real>(teacher.rows * teacher.width)};
  const auto log_softmax = [&](const Matrix& logits, int64_t row, Real tau) {
    std::vector<Real> log_p(args.classes);
    Real top = -kInf, sum = 0;
    for (int64_t k = 0; k < args.classes; ++k) top = std::max(top, log_p[k] = logits.get(row, k) / tau);
    for (const Real x : log_p) sum += std::exp(x - top);
    for (Real& x : log_p) x -= top + std::log(sum);
    return log_p;
  };
  for (int64_t r = 0; r < student.rows; ++r) {
    if (weight[r] == 0) continue;
    const auto log_q = log_softmax(student, r, args.tau), log_p = log_softmax(teacher, r, args.teacher_tau);
    Real kl = 0;
    for (int64_t k = 0; k < args.classes; ++k)
      if (log_p[k] > -kInf) kl += std::exp(log_p[k]) * (log_p[k] - log_q[k]);
    truth.row_loss[r] = kl * args.scale * weight[r];
    const Real factor = Real(grad_loss[r]) * args.grad_scale * weight[r] * args.scale;
    for (int64_t k = 0; k < args.classes; ++k) {
      const Real p = std::exp(log_p[k]), q = std::exp(log_q[k]);
      truth.grad_student[r * student.width + k] = factor / args.tau * (q - p);
      truth.grad_teacher[r * teacher.width + k] = p == 0 ? 0 : factor / args.teacher_tau * p * (log_p[k] - log_q[k] - kl);
    }
  }
  return truth;
}

void run(Matrix student, const Matrix& teacher, int64_t classes, double tau, double teacher_tau, const std::string& name) {
  const int64_t rows = student.rows;
  std::vector<float> weight(rows), grad_loss(rows);
  for (int64_t r = 0; r < rows; ++r)
    weight[r] = r % 3 == 1 ? 0.f : 0.5f + float(r % 3), grad_loss[r] = 0.25f * float(1 + r % 5);

  auto args = args_for<kdfast::KlDivTauArgs>(student, teacher, classes);
  args.tau = tau;
  args.teacher_tau = teacher_tau;
  args.scale = tau * tau;
  args.weight = {weight.data(), kdfast::NumberType::f32};
  args.grad_loss = {grad_loss.data(), kdfast::NumberType::f32};
  args.grad_scale = 0.5;
  const Truth truth = oracle(student, teacher, args, weight, grad_loss);
  Real expected = 0;
  for (const Real loss : truth.row_loss) expected += loss;

  const DType computed = compute_type(student.dtype, teacher.dtype);
  std::vector<double> row_loss(rows), row_stats(rows * kdfast::KlStat::count);
  args.row_loss = row_loss.data();
  args.row_stats = row_stats.data();
  Matrix grad_student(student.dtype, rows, student.width, 1), grad_teacher(teacher.dtype, rows, teacher.width, 5);
  args.grad_student = grad_student.gradient();
  kdfast::cpu::kl_div_tau_forward(args, 0, rows);
  const Real error = std::abs(total(row_loss.data(), computed, rows) - expected);
  check_error(expected > 0 ? error / expected : error, loss_budget(computed), name + " loss");  // one class: exactly 0
  check_gradient(grad_student, truth.grad_student, computed, name + " student's gradient, forward");

  // In two parts: the same bits.
  const std::vector<double> whole = row_loss;
  const Matrix whole_student = grad_student;
  kdfast::cpu::kl_div_tau_forward(args, rows / 2, rows);
  kdfast::cpu::kl_div_tau_forward(args, 0, rows / 2);
  check(std::memcmp(whole.data(), row_loss.data(), sizeof(double) * rows) == 0, name + " loss in two parts");
  check(whole_student == grad_student, name + " gradient in two parts");

  args.grad_student = {};
  kdfast::cpu::kl_div_tau_forward(args, 0, rows);  // leaves row_stats
  args.grad_teacher = grad_teacher.gradient();
  kdfast::cpu::kl_div_tau_backward(args, 0, rows);
  check_gradient(grad_teacher, truth.grad_teacher, computed, name + " teacher's gradient, backward");
  args.grad_student = student.gradient();
  kdfast::cpu::kl_div_tau_backward(args, 0, rows);
  check_gradient(student, truth.grad_student, computed, name + " student's gradient, backward in place");
  check_gradient(grad_teacher, truth.grad_teacher, computed, name + " teacher's gradient, backward for both");
}

void dtypes_and_lengths() {
  const double taus[][2] = {{0.3, 0.3}, {1, 1}, {4, 2}, {20, 20}, {1000, 1000}};
  unsigned seed = 0;
  for (const DType s : kDTypes)
    for (const DType t : kDTypes)
      for (const int64_t classes : {1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 64, 100, 513})
        for (const auto& tau : taus) {
          ++seed;
          Matrix student = random_logits(s, 5, classes + seed % 4, seed),
                 teacher = random_logits(t, 5, classes + seed % 3, seed + 1);
          for (int64_t k = 0; k < student.width; ++k) student.set(1, k, kNan);  // a row of weight 0
          run(student, teacher, classes, tau[0], tau[1],
              std::string(kDTypeNames[int(s)]) + "-" + kDTypeNames[int(t)] + " K=" + std::to_string(classes) +
                  " tau=" + std::to_string(tau[0]));
        }
}

// Gradients of 8 MB and more are written past the caches, in whole aligned vectors.
void long_gradient() {
  run(random_logits(DType::f32, 520, 4099, 1), random_logits(DType::bf16, 520, 4099, 2), 4099, 4, 4, "8 MB gradient");
}

void masked_classes() {
  Matrix student = random_logits(DType::f32, 4, 37, 1), teacher = random_logits(DType::f32, 4, 37, 2);
  for (int64_t k = 5; k < 37; k += 4) student.set(0, k, -kInf), teacher.set(0, k, -kInf);
  for (int64_t k = 5; k < 37; k += 4) teacher.set(2, k, -kInf);
  run(student, teacher, 37, 2, 2, "-inf");

  student.set(3, 7, -kInf);  // where the teacher has mass
  student.set(1, 7, kNan);
  std::vector<float> row_loss(4);
  auto args = args_for<kdfast::KlDivTauArgs>(student, teacher, 37);
  args.row_loss = row_loss.data();
  kdfast::cpu::kl_div_tau_forward(args, 0, 4);
  check(std::isfinite(row_loss[0]) && std::isfinite(row_loss[2]), "NaN and inf stay in their rows");
  check(std::isnan(row_loss[1]), "NaN in, NaN out");
  check(row_loss[3] == kInf, "the student has no mass where the teacher has: +inf");
}

}  // namespace

int main() {
  skip_without_isa();
  dtypes_and_lengths();
  long_gradient();
  masked_classes();
  return report();
}
