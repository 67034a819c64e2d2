//go:build e2e

package main

// Kubernetes' own e2e tests are built from this module too; this import keeps what they need in go.sum.
import _ "k8s.io/kubernetes/test/e2e"
