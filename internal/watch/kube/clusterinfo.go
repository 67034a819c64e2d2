package kube

import (
	"context"
	"fmt"
	"net"
	"net/url"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/clientcmd"
)

// ClusterInfo returns the API server's address, HOST:PORT, that kubeadm publishes for nodes which are to join, or
// nothing if kubeadm did not make the cluster.
// https://kubernetes.io/docs/reference/setup-tools/kubeadm/implementation-details/
func (c *Client) ClusterInfo(ctx context.Context) (string, error) {
	m, err := c.CoreV1().ConfigMaps(metav1.NamespacePublic).Get(ctx, "cluster-info", metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("read ConfigMap kube-public/cluster-info: %w", err)
	}
	config, err := clientcmd.Load([]byte(m.Data["kubeconfig"]))
	if err != nil {
		return "", fmt.Errorf("read ConfigMap kube-public/cluster-info: %w", err)
	}
	for _, cluster := range config.Clusters {
		u, err := url.Parse(cluster.Server)
		if err != nil || u.Hostname() == "" {
			continue
		}
		port := u.Port()
		if port == "" {
			port = "443"
		}
		return net.JoinHostPort(u.Hostname(), port), nil
	}
	return "", nil
}
