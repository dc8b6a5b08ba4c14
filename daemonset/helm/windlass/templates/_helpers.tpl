{{- define "windlass.labels" -}}
app.kubernetes.io/name: windlass
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "windlass.selector" -}}
app.kubernetes.io/name: windlass
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "windlass.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- define "windlass.account" -}}
{{ .Release.Namespace }}-{{ .Release.Name }}
{{- end }}

{{/* What the daemon is told by environment. Call with root, seed, budget, dataDir, grace. */}}
{{- define "windlass.env" -}}
{{- $root := .root -}}
{{- if or .seed (eq $root.Values.tls.mode "csi") }}
- name: NODE_NAME
  valueFrom: { fieldRef: { fieldPath: metadata.name } }
{{- else }}
- name: NODE_NAME
  valueFrom: { fieldRef: { fieldPath: spec.nodeName } }
{{- end }}
- name: POD_IP
  valueFrom: { fieldRef: { fieldPath: status.podIP } }
# Kubernetes 1.35 puts the node's zone on its pods; before that it is empty unless config says it.
- name: WINDLASS_NODE__ZONE
  valueFrom: { fieldRef: { fieldPath: "metadata.labels['topology.kubernetes.io/zone']" } }
- name: WINDLASS_NODE__CLUSTER
  value: {{ $root.Values.cluster | quote }}
- name: WINDLASS_NODE__SEED
  value: {{ .seed | quote }}
- name: WINDLASS_GOSSIP__PEERS
  value: {{ printf "[\"%s-peers.%s.svc:5103\"]" $root.Release.Name $root.Release.Namespace | quote }}
{{- if eq $root.Values.tls.mode "csi" }}
- name: WINDLASS_TLS__CA
  value: /etc/windlass-tls/ca.crt
- name: WINDLASS_TLS__CERTIFICATE
  value: /etc/windlass-tls/tls.crt
- name: WINDLASS_TLS__KEY
  value: /etc/windlass-tls/tls.key
{{- else }}
- name: WINDLASS_TLS__CA
  value: /etc/windlass-tls/tls.crt
- name: WINDLASS_TLS__CA_KEY
  value: /etc/windlass-tls/tls.key
{{- end }}
- name: WINDLASS_STORE__DATA_DIR
  value: {{ .dataDir }}
- name: WINDLASS_STORE__BUDGET
  value: {{ .budget | quote }}
- name: WINDLASS_SHUTDOWN__DRAIN_DEADLINE_MS
  value: {{ mul (sub (int .grace) 5) 1000 | quote }}
{{- if .seed }}
# Its volume comes back with it.
- name: WINDLASS_SHUTDOWN__OFFER_SOLE_COPIES
  value: "false"
{{- end }}
{{- end }}

{{/* Certificates and configuration. */}}
{{- define "windlass.volumes" -}}
- name: config
  configMap: { name: {{ .Release.Name }}-config }
- name: tls
{{- if eq .Values.tls.mode "csi" }}
  csi:
    driver: csi.cert-manager.io
    readOnly: true
    volumeAttributes:
      csi.cert-manager.io/issuer-kind: {{ .Values.tls.csi.issuerKind }}
      csi.cert-manager.io/issuer-name: {{ .Values.tls.csi.issuerName }}
      csi.cert-manager.io/uri-sans: "windlass://{{ .Values.cluster }}/${POD_NAME}"
      csi.cert-manager.io/duration: 720h
      csi.cert-manager.io/key-usages: digital signature,server auth,client auth
      csi.cert-manager.io/privatekey-encoding: PKCS8
      csi.cert-manager.io/key-algorithm: ECDSA
{{- else }}
  secret: { secretName: {{ .Values.tls.secretName }}, defaultMode: 0440 }
{{- end }}
{{- end }}

{{- define "windlass.probes" -}}
# Answers from the first moment on; a store that is scanned after a crash is alive and not ready.
livenessProbe:
  httpGet: { path: /healthz, port: admin }
  periodSeconds: 10
  failureThreshold: 6
readinessProbe:
  httpGet: { path: /readyz, port: admin }
  periodSeconds: 5
{{- end }}

{{/* Whether anything is asked of the API server. */}}
{{- define "windlass.asks" -}}
{{- if or .Values.startupTaint.enabled .Values.events.enabled }}yes{{ end }}
{{- end }}
