"""What a chip is. Vendor words (`torch.cuda`, `nccl`, `npu`, ...) occur under this package only."""
