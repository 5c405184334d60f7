// The wheel of Paddle 2.6 comes without this file, a part of class DenseTensor. These are its members that are used.
 public:
  bool has_allocation() const { return bool(holder_); }
  const std::shared_ptr<phi::Allocation>& Holder() const { return holder_; }
  void ResetHolder(const std::shared_ptr<phi::Allocation>& holder);
