# EKS Pod Identity: nothing to annotate, and it works for pods in the node's network.

data "aws_iam_policy_document" "trust" {
  statement {
    actions = ["sts:AssumeRole", "sts:TagSession"]
    principals {
      type        = "Service"
      identifiers = ["pods.eks.amazonaws.com"]
    }
  }
}

resource "aws_eks_pod_identity_association" "windlass" {
  cluster_name    = var.cluster_name
  namespace       = var.namespace
  service_account = "windlass"
  role_arn        = aws_iam_role.windlass.arn
}
