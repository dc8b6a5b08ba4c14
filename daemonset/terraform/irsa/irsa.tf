# IRSA instead of Pod Identity: copy this over ../pod-identity.tf, and give the chart
#   serviceAccount.annotations: { eks.amazonaws.com/role-arn: <the role's ARN> }

variable "oidc_provider_arn" { type = string }
variable "oidc_issuer" {
  type        = string
  description = "The cluster's OIDC issuer without https://"
}

data "aws_iam_policy_document" "trust" {
  statement {
    actions = ["sts:AssumeRoleWithWebIdentity"]
    principals {
      type        = "Federated"
      identifiers = [var.oidc_provider_arn]
    }
    condition {
      test     = "StringEquals"
      variable = "${var.oidc_issuer}:sub"
      values   = ["system:serviceaccount:${var.namespace}:windlass"]
    }
    condition {
      test     = "StringEquals"
      variable = "${var.oidc_issuer}:aud"
      values   = ["sts.amazonaws.com"]
    }
  }
}
