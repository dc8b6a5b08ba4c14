# What windlass may do in AWS: read images, read one prefix, and decrypt with that bucket's key. Nothing is written.
# Use either the IRSA role or the Pod Identity association below; both have the same policy.

variable "cluster_name" { type = string }
variable "repositories" {
  type        = list(string)
  description = "ARNs of the ECR repositories that are mirrored"
}
variable "bucket" { type = string }
variable "prefix" {
  type        = string
  description = "What may be read in the bucket, as in s3.buckets: \"released/\"; empty for all of it"
}
variable "kms_key_arn" {
  type        = string
  default     = null
  description = "The bucket's key, when it has one of its own (SSE-KMS)"
}
variable "namespace" {
  type    = string
  default = "windlass"
}

data "aws_partition" "this" {}

data "aws_iam_policy_document" "windlass" {
  # A token is for the whole account; what it opens is below.
  statement {
    actions   = ["ecr:GetAuthorizationToken"]
    resources = ["*"]
  }
  statement {
    actions   = ["ecr:BatchGetImage", "ecr:GetDownloadUrlForLayer", "ecr:BatchCheckLayerAvailability"]
    resources = var.repositories
  }
  statement {
    actions   = ["s3:ListBucket"]
    resources = ["arn:${data.aws_partition.this.partition}:s3:::${var.bucket}"]
    condition {
      test     = "StringLike"
      variable = "s3:prefix"
      values   = ["${var.prefix}*"]
    }
  }
  statement {
    actions   = ["s3:GetObject", "s3:GetObjectVersion"]
    resources = ["arn:${data.aws_partition.this.partition}:s3:::${var.bucket}/${var.prefix}*"]
  }
  dynamic "statement" {
    for_each = var.kms_key_arn == null ? [] : [var.kms_key_arn]
    content {
      actions   = ["kms:Decrypt"]
      resources = [statement.value]
    }
  }
}

resource "aws_iam_policy" "windlass" {
  name   = "${var.cluster_name}-windlass"
  policy = data.aws_iam_policy_document.windlass.json
}

resource "aws_iam_role_policy_attachment" "windlass" {
  role       = aws_iam_role.windlass.name
  policy_arn = aws_iam_policy.windlass.arn
}

resource "aws_iam_role" "windlass" {
  name               = "${var.cluster_name}-windlass"
  assume_role_policy = data.aws_iam_policy_document.trust.json
}
