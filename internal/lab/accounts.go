package lab

import (
	"context"
	"fmt"
	"strings"

	"github.com/fathom-network/fathom/internal/watch/kube"
)

// controllerAccounts are the service accounts of kube-system that kube-controller-manager's controllers act as. A scenario
// compares them with those of a cluster.
var controllerAccounts = strings.Fields(`
	attachdetach-controller bootstrap-signer certificate-controller clusterrole-aggregation-controller cronjob-controller
	daemon-set-controller deployment-controller device-taint-eviction-controller disruption-controller endpoint-controller
	endpointslice-controller endpointslicemirroring-controller ephemeral-volume-controller expand-controller
	generic-garbage-collector horizontal-pod-autoscaler job-controller legacy-service-account-token-cleaner
	namespace-controller node-controller persistent-volume-binder pod-garbage-collector pv-protection-controller
	pvc-protection-controller replicaset-controller replication-controller resource-claim-controller
	resourcequota-controller root-ca-cert-publisher service-account-controller service-cidrs-controller
	statefulset-controller token-cleaner ttl-after-finished-controller ttl-controller
	validatingadmissionpolicy-status-controller volumeattributesclass-protection-controller`)

// createAccounts makes the controllers' service accounts. The controller manager makes those that are not there itself,
// one after the other and each once it has asked for it, before any of its controllers begins: 0.3 s in which every pod of
// the cluster waits. Before that it waits for the API server's roles, and the processors for something to do.
func createAccounts(ctx context.Context, client *kube.Client) error {
	var manifest strings.Builder
	for _, name := range controllerAccounts {
		fmt.Fprintf(&manifest, "---\napiVersion: v1\nkind: ServiceAccount\nmetadata: {name: %s, namespace: kube-system}\n", name)
	}
	return client.Create(ctx, []byte(manifest.String()))
}
