package install

import (
	"context"
	"fmt"
	"net"
	"net/url"
	"strconv"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/fathom-network/fathom/internal/watch/kube"
)

// APIServer finds the address at which nodes reach the API server without a Service proxy: the one that kubeadm published
// for joining nodes, otherwise the endpoint of the Service kubernetes.
func APIServer(ctx context.Context, client *kube.Client) (string, error) {
	published, err := clusterInfo(ctx, client)
	if err != nil || published != "" {
		return published, err
	}
	slices, err := client.DiscoveryV1().EndpointSlices("default").List(ctx, metav1.ListOptions{LabelSelector: "kubernetes.io/service-name=kubernetes"})
	if err != nil {
		return "", fmt.Errorf("look for the API server's address: %w", err)
	}
	for _, s := range slices.Items {
		for _, e := range s.Endpoints {
			if len(e.Addresses) > 0 && len(s.Ports) > 0 && s.Ports[0].Port != nil {
				return net.JoinHostPort(e.Addresses[0], strconv.Itoa(int(*s.Ports[0].Port))), nil
			}
		}
	}
	return "", nil
}

// clusterInfo returns the API server's address, HOST:PORT, that kubeadm publishes for nodes that join, or ""
// if kubeadm did not make the cluster.
// https://kubernetes.io/docs/reference/setup-tools/kubeadm/implementation-details/
func clusterInfo(ctx context.Context, client *kube.Client) (string, error) {
	m, err := client.CoreV1().ConfigMaps(metav1.NamespacePublic).Get(ctx, "cluster-info", metav1.GetOptions{})
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
