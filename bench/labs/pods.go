package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// service is a Deployment with its Service, and a pod that asks the Service by its name until it answers.
// They are made at once: the client's first questions come before there is anything to answer them.
const service = `
apiVersion: apps/v1
kind: Deployment
metadata: {name: hello}
spec:
  selector: {matchLabels: {app: hello}}
  template:
    metadata: {labels: {app: hello}}
    spec:
      terminationGracePeriodSeconds: 0
      containers:
      - {name: web, image: "toolbox:1", command: [webserver, "80"]}
---
apiVersion: v1
kind: Service
metadata: {name: hello}
spec:
  selector: {app: hello}
  ports: [{port: 80}]
---
apiVersion: v1
kind: Pod
metadata: {name: client}
spec:
  restartPolicy: Never
  terminationGracePeriodSeconds: 0
  containers:
  - name: client
    image: toolbox:1
    command: [sh, -c, "until curl -so /dev/null -m 1 http://hello.default.svc.cluster.local; do sleep 0.05; done; echo answered"]
`

// answered returns when the client of service says that it was answered. It looks at the container's log on the node's
// disk: the pod's status would come up to a second later.
func (l *lab) answered(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	pattern := filepath.Join(l.dir("*"), "var/log/pods/default_client_*/client/0.log")
	for {
		logs, err := filepath.Glob(pattern)
		if err != nil {
			return err
		}
		for _, path := range logs {
			if data, err := os.ReadFile(path); err == nil && strings.Contains(string(data), "answered") {
				return nil
			}
		}
		select {
		case <-ctx.Done():
			pods, _ := l.kubectl(context.WithoutCancel(ctx), "", "get", "pods", "-A", "-o", "wide")
			return fmt.Errorf("a pod's request to a Service, by its name: %w\n%s", context.Cause(ctx), pods)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// many is a Deployment of pods that do nothing.
const many = `
apiVersion: apps/v1
kind: Deployment
metadata: {name: many}
spec:
  replicas: %d
  progressDeadlineSeconds: 300
  selector: {matchLabels: {app: many}}
  template:
    metadata: {labels: {app: many}}
    spec:
      terminationGracePeriodSeconds: 0
      containers:
      - {name: pause, image: %q}
`

// schedule makes a Deployment of n pods and returns how long it took until all were Ready.
func (l *lab) schedule(ctx context.Context, n int) (float64, error) {
	start := time.Now()
	if err := l.create(ctx, fmt.Sprintf(many, n, l.kit.PauseImage)); err != nil {
		return 0, err
	}
	_, err := l.kubectl(ctx, "", "wait", "--timeout=3m", fmt.Sprintf("--for=jsonpath={.status.readyReplicas}=%d", n), "deployment/many")
	return time.Since(start).Seconds(), err
}

// unschedule removes what schedule made and returns when it is gone.
func (l *lab) unschedule(ctx context.Context) error {
	if _, err := l.kubectl(ctx, "", "delete", "--ignore-not-found", "--cascade=foreground", "deployment/many"); err != nil {
		return err
	}
	_, err := l.kubectl(ctx, "", "wait", "--for=delete", "--timeout=2m", "pod", "--selector=app=many")
	return err
}
